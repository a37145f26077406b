"""The application's configuration; a package, so that Hydra finds it in an installed wheel as `pkg://sparsetrain.conf`."""
