"""The application: `train` composes a run from its configuration, trains, and leaves its results in a folder."""
