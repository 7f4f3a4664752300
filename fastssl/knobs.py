"""The knobs of each method, with unit, default and source: frozen dataclasses, without torch.

They stand apart from the losses in `objectives/`, so that `--help` need not import torch. Each
class there names its own as `Knobs`; `KNOBS` has them by the name of the method.
"""

from dataclasses import dataclass
from typing import Any, Literal

from fastssl.config import Knobs, require


def require_weights(knobs: Knobs, *names: str) -> None:
    """ValueError unless each of these knobs is 0 or more; None stands for a tuned weight."""
    for name in names:
        value = getattr(knobs, name)
        require(knobs, name, value is None or value >= 0, "be 0 or more")


@dataclass(frozen=True)
class ProjectorKnobs(Knobs):
    """Knobs of every method with a projector."""

    projector_width: int = 8192
    """Hidden and output width of the projector; 8192 is Barlow Twins' and VICReg's choice, 4096
    EMP-SSL's; weights are tuned from 64 to 8192."""
    projector_layers: int = 3
    """Linear layers of the projector; 3 is all papers' choice."""
    projector_out: int = 0
    """Output width of the projector where it differs; 0 takes projector_width, for EMP-SSL a
    quarter of it (4096 to 1024 in its repository)."""

    def __post_init__(self) -> None:
        require(self, "projector_layers", self.projector_layers >= 1, "be at least 1")
        for name in ("projector_width", "projector_out"):
            width = getattr(self, name)
            valid = 16 <= width <= 16384 or (name == "projector_out" and width == 0)
            require(self, name, valid, "lie between 16 and 16384")

    @property
    def embedding_width(self) -> int:
        """D."""
        return self.projector_out or self.projector_width


@dataclass(frozen=True)
class OracleKnobs(Knobs):
    """Knobs of every method with a loss on a similarity graph."""

    oracle: Literal["none", "labels", "queries"] = "none"
    """PAL (arXiv:2303.15256): similarities beyond views of one image, from the labels
    of `oracle_share` of the images or from `oracle_queries` yes/no answers. Labels reach training
    only here, and oracle.json records which."""
    oracle_share: float = 1.0
    """PAL with labels: fraction of the images whose label is read."""
    oracle_queries: int = 1000
    """PAL with queries: number of pairs of images to query, over the first half of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # of the knobs that it is mixed with
        require(self, "oracle_share", 0 < self.oracle_share <= 1, "lie in (0, 1]")
        require(self, "oracle_queries", self.oracle_queries >= 1, "be at least 1")


@dataclass(frozen=True)
class BarlowTwinsKnobs(OracleKnobs, ProjectorKnobs):
    """Knobs of Barlow Twins, arXiv:2103.03230."""

    lambd: float | None = None
    """Weight of the off-diagonal; by default that tuned in arXiv:2312.10725 for width and views,
    which falls as 1 / width (the first paper's is 0.0051 at width 8192)."""
    pairing: Literal["pairs", "mean"] = "pairs"
    """More than two views: all pairs, or each view with the mean (arXiv:2312.10725)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self, "lambd")


@dataclass(frozen=True)
class VarianceKnobs(ProjectorKnobs):
    """The weights of VICReg and of its variants."""

    sim_coeff: float = 25.0
    """Weight of invariance (arXiv:2105.04906)."""
    std_coeff: float = 25.0
    """Weight of variance (arXiv:2105.04906)."""
    cov_coeff: float | None = None
    """Weight of covariance; by default that tuned in arXiv:2312.10725 for the width, 1 at 256
    and 1/30 at 8192 (the first paper's is 1 at 8192); 1 for VICReg-exp and VICReg-ctr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self, "sim_coeff", "std_coeff", "cov_coeff")

    def weights(self, default_cov_coeff: float) -> dict[str, Any]:
        """The keyword arguments of `vicreg_loss` and its variants."""
        cov_coeff = default_cov_coeff if self.cov_coeff is None else self.cov_coeff
        return {"sim_coeff": self.sim_coeff, "std_coeff": self.std_coeff, "cov_coeff": cov_coeff}


@dataclass(frozen=True)
class VICRegKnobs(OracleKnobs, VarianceKnobs):
    """Knobs of VICReg, arXiv:2105.04906."""

    pairing: Literal["pairs", "mean"] = "pairs"
    """More than two views: all pairs, or each view with the mean of the others
    (arXiv:2312.10725)."""


@dataclass(frozen=True)
class ContrastiveKnobs(ProjectorKnobs):
    """Knobs of the losses with a softmax over similarities."""

    temperature: float = 0.15
    """Temperature of the softmax; 0.15 is tuned for SimCLR in arXiv:2206.02574, section 5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "temperature", self.temperature > 0, "be positive")


@dataclass(frozen=True)
class SimCLRKnobs(OracleKnobs, ContrastiveKnobs):
    """Knobs of SimCLR, arXiv:2002.05709."""


@dataclass(frozen=True)
class VICRegExpKnobs(ContrastiveKnobs, VarianceKnobs):
    """Knobs of VICReg-exp and VICReg-ctr, arXiv:2206.02574. The paper does not state its runs'
    temperature."""


@dataclass(frozen=True)
class EMPSSLKnobs(ProjectorKnobs):
    """Knobs of EMP-SSL, arXiv:2304.03977."""

    patch_coeff: float = 200.0
    """Weight of the cosine to the mean embedding (arXiv:2304.03977)."""
    eps_sq: float = 0.2
    """Squared distortion of the coding rate (arXiv:2304.03977)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self, "patch_coeff")
        require(self, "eps_sq", self.eps_sq > 0, "be positive")

    @property
    def embedding_width(self) -> int:
        """D: `projector_out`, by default a quarter of the width as in the paper's repository."""
        return self.projector_out or self.projector_width // 4


@dataclass(frozen=True)
class SpectralKnobs(OracleKnobs, ProjectorKnobs):
    """Knobs of the spectral loss."""

    orthogonality: float = 1.0
    """Weight of |E[z z^T] - I|^2; 1 is the spectral contrastive loss (arXiv:2106.04156)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights(self, "orthogonality")


@dataclass(frozen=True)
class DIETKnobs(Knobs):
    """Knobs of DIET, arXiv:2302.10260. It has no projector."""

    label_smoothing: float = 0.8
    """Label smoothing of the cross-entropy (arXiv:2302.10260)."""
    fused_head: bool = False
    """Update the head inside backward, so that its gradient is never stored; the rule is that of
    `optimizer`, AdamW or SGD."""
    sample_rate: float = 1.0
    """Fraction of the classes in each step's softmax; below 1 it is Partial FC's approximation
    (arXiv:2203.15565), and needs fused_head."""

    def __post_init__(self) -> None:
        require(self, "label_smoothing", 0 <= self.label_smoothing <= 1, "lie in [0, 1]")
        require(self, "sample_rate", 0 < self.sample_rate <= 1, "lie in (0, 1]")
        if self.sample_rate < 1 and not self.fused_head:
            raise ValueError(
                f"--sample-rate is {self.sample_rate}: values below 1 are supported only with "
                "--fused-head"
            )


@dataclass(frozen=True)
class SDIETKnobs(ProjectorKnobs):
    """Knobs of S-DIET."""

    label_smoothing: float = 0.8
    """Label smoothing of the cross-entropy (arXiv:2302.10260)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "label_smoothing", 0 <= self.label_smoothing <= 1, "lie in [0, 1]")


# A method that is not listed here works too; its --help is slower, since it imports torch.
KNOBS: dict[str, type[Knobs]] = {
    "barlow": BarlowTwinsKnobs,
    "diet": DIETKnobs,
    "emp_ssl": EMPSSLKnobs,
    "sdiet": SDIETKnobs,
    "simclr": SimCLRKnobs,
    "simclr_abs": ContrastiveKnobs,
    "simclr_sq": ContrastiveKnobs,
    "spectral": SpectralKnobs,
    "vicreg": VICRegKnobs,
    "vicreg_ctr": VICRegExpKnobs,
    "vicreg_exp": VICRegExpKnobs,
}
