"""A GPT-2 of any size, whose attention and feed-forward layers are plain linear ones."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

_STD = 0.02


class GPT(nn.Module):
    """A decoder that reads tokens and predicts each next one from those up to it: pre-norm blocks, learned positions.

    With V symbols, context T, width d and L layers it has 12 d^2 L + 13 d L + (V + T) d + 2 d parameters, and V d more
    if the head is not tied: 124,439,808 for GPT-2 small (V = 50,257, T = 1,024).

    Matrices are drawn from N(0, 0.02^2), those that end a residual branch from N(0, 0.02^2 / 2L); biases are 0.

    Args:
        vocabulary: number of symbols V, at least 2.
        context: most tokens that are read at a time, at least 1.
        layers: number of blocks.
        width: of a token's vector; a multiple of `heads`.
        heads: of attention.
        dropout: rate in embeddings, attention weights and residual branches, in [0, 1).
        tied: let the head use the matrix of the embedding, as in GPT-2. It then counts as an embedding, which is not
            pruned unless named and never runs N:M.

    Raises:
        ValueError: a value outside its range.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3; sizes and dropout
    are those of its code. GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    Differs: positions are drawn as the other matrices, where GPT-2's code takes 0.01.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        dropout: float = 0.0,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if vocabulary < 2 or min(context, layers, heads) < 1 or width < heads or width % heads or not 0 <= dropout < 1:
            raise ValueError(
                f"GPT(vocabulary={vocabulary}, context={context}, layers={layers}, width={width}, heads={heads}, "
                f"dropout={dropout}): vocabulary is at least 2, context, layers and heads at least 1, width a multiple "
                "of heads, and dropout in [0, 1)."
            )
        self.context = context
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                ends_branch = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
                nn.init.normal_(parameter, std=_STD / math.sqrt(2 * layers) if ends_branch else _STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each next token, shape (batch, time, vocabulary), of tokens int64, shape (batch, time)."""
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(f"{time} tokens are more than the context of {self.context}. Make the GPT for that many.")
        hidden = self.drop(self.embed(tokens) + self.position.weight[:time])
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class _Block(nn.Module):
    """Attention and a feed-forward network, each normalised before and added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _MLP(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        attended = x + self.drop(self.attn(self.norm1(x)))
        hidden: Tensor = attended + self.drop(self.mlp(self.norm2(attended)))
        return hidden


class _Attention(nn.Module):
    """Causal self-attention of several heads, from one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class _MLP(nn.Module):
    """To four times the width and back, with GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return projected
