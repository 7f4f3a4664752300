"""Config: every knob of a run, its unit, and where its default comes from.

A recipe is a value of it (`recipes.py`), an experiment is `replace(recipe, ...)`, and the command
line derives its flags from it. It is frozen: what a run's `config.json` says is what the run did.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fastssl.methods import METHODS

ORACLE_METHODS = ("simclr", "vicreg", "spectral", "barlow")  # those with a form for PAL's graph
_SAME_OUT = ("projector_out", 0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain a vision backbone without labels, then measure how good its features are."""

    # data
    data: str = ""
    """'digits', 'cifar10' (downloaded), an .npz with x_train [y_train x_test y_test], a folder of
    images or of class folders (with train/ and val/ or test/ or without), tar shards (or a folder
    of them; no labels), or CIFAR-10's python batches."""
    engine: Literal["auto", "resident", "dali", "ffcv"] = "resident"
    """What decodes and renders the views: 'resident' holds the images in memory at load_size;
    'dali' and 'ffcv' decode a folder's or shards' JPEGs as they go; 'auto' chooses and says why."""
    render: Literal["fastssl", "dali"] = "fastssl"
    """Engine dali: who makes the views; DALI's own operators approximate, and say how."""
    scaled: bool = True
    """Engines dali (on a CPU) and ffcv: decode JPEGs at 1/2, 1/4 or 1/8 where views need no more.
    """
    oriented: bool = False
    """Turn the images of a folder or of shards as their EXIF tag says, in training and evaluation;
    torchvision ignores it."""
    on_corrupt: Literal["skip", "stop"] = "skip"
    """What an unreadable image does: it is named and left out, or it ends the run."""
    corrupt_quota: float = 0.01
    """Share of the images that may be unreadable before a run with --on-corrupt skip stops."""
    load_size: int = 256
    """Side of the square, in px, to which images of a folder are resized and cropped when they are
    loaded."""
    train_images: int = 0
    """Use only the first so many images of the training part, for training and as the labelled ones
    of the evaluation; 0 uses all."""
    holdout: float = 0.2
    """Share of the images kept out of pretraining for evaluation, where the data has no test part
    of its own."""

    # method
    method: Literal[
        "barlow",
        "diet",
        "emp_ssl",
        "sdiet",
        "simclr",
        "simclr_abs",
        "simclr_sq",
        "spectral",
        "vicreg",
        "vicreg_ctr",
        "vicreg_exp",
    ] = "barlow"
    """The self-supervised objective; `fastssl.methods` has each one's paper and formula."""
    policy: str = "simclr"
    """Augmentation policy, by its name in fastssl_pipelines.policies."""
    views: int = 2
    """Views of each image in a batch; for EMP-SSL its patches, 20 to 200 in the paper."""
    image_size: int = 224
    """Side of a view, in px."""
    projector_width: int = 8192
    """Hidden and output width of the projector; 8192 is Barlow Twins' and VICReg's choice, 4096
    EMP-SSL's; weights are tuned from 64 to 8192. DIET has no projector."""
    projector_layers: int = 3
    """Linear layers of the projector; 3 is all papers' choice."""
    projector_out: int = 0
    """Output width of the projector where it differs; 0 takes projector_width, for EMP-SSL a
    quarter of it (4096 to 1024 in its repository)."""
    pairing: Literal["pairs", "mean"] = "pairs"
    """More than two views of Barlow Twins and VICReg: all pairs, or each view with the mean
    (arXiv:2312.10725)."""
    label_smoothing: float = 0.8
    """DIET's and S-DIET's label smoothing (arXiv:2302.10260)."""
    fused_head: bool = False
    """DIET: update the head inside backward, so that its gradient is never stored; the rule is that
    of `optimizer`, AdamW or SGD."""
    sample_rate: float = 1.0
    """DIET: share of the classes in each step's softmax; below 1 it is Partial FC's approximation
    (arXiv:2203.15565), and needs fused_head."""
    lambd: float | None = None
    """Barlow Twins' off-diagonal weight; by default the tuned one of arXiv:2312.10725 for width and
    views, which falls as 1 / width (the first paper's is 0.0051 at width 8192)."""
    sim_coeff: float = 25.0
    """VICReg's invariance weight (arXiv:2105.04906)."""
    std_coeff: float = 25.0
    """VICReg's variance weight (arXiv:2105.04906)."""
    cov_coeff: float | None = None
    """VICReg's covariance weight; by default the tuned one of arXiv:2312.10725 for the width, 1 at
    256 and 1/30 at 8192 (the first paper's is 1 at 8192); 1 for VICReg-exp and VICReg-ctr."""
    temperature: float = 0.15
    """Of SimCLR, tuned in arXiv:2206.02574, of its variants, and of VICReg-exp and VICReg-ctr."""
    orthogonality: float = 1.0
    """Weight of |E[z z^T] - I|^2 in the spectral loss; 1 is the spectral contrastive loss
    (arXiv:2106.04156)."""
    patch_coeff: float = 200.0
    """EMP-SSL's weight of the cosine to the mean embedding (arXiv:2304.03977)."""
    eps_sq: float = 0.2
    """EMP-SSL's squared distortion of the coding rate (arXiv:2304.03977)."""
    oracle: Literal["none", "labels", "queries"] = "none"
    """PAL (arXiv:2303.15256): what is known to be alike besides views of one image, from the labels
    of `oracle_share` of the images or from `oracle_queries` yes/no answers. Labels reach training
    only here, and the run's log says which."""
    oracle_share: float = 1.0
    """PAL with labels: share of the images whose label is asked for."""
    oracle_queries: int = 1000
    """PAL with queries: pairs of images that are asked about, over the first half of the run."""

    # network
    backbone: str = "resnet50"
    """'fastnet', 'fastnet-64', ... (a small net for CPUs) or any timm model name."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """'cifar' turns a ResNet's first layers into one 3x3 convolution, for images of 32 px."""

    # optimisation
    batch_size: int = 256
    """Images in a batch, of each rank; the last incomplete batch of an epoch is dropped."""
    global_batch: int = 0
    """Images in a batch over all ranks of a torchrun launch, in place of `batch_size`; 0: unset."""
    accumulate: int = 1
    """Parts in which the backbone passes a batch, to save memory: each part's activations are
    computed again in the backward pass. Exact for every loss; batch norm sees one part at a time.
    """
    epochs: int = 100
    """Passes over the data."""
    optimizer: Literal["adamw", "lars", "sgd"] = "adamw"
    """The update rule; SGD and LARS use `momentum`."""
    lr: float = 1e-3
    """Peak learning rate, as it is: no scaling with the batch size."""
    weight_decay: float = 0.05
    """Decay of weights; biases and normalisation layers are exempt."""
    momentum: float = 0.9
    """Momentum of SGD and LARS."""
    nesterov: bool = False
    """Nesterov momentum for SGD and LARS; EMP-SSL has it (arXiv:2304.03977)."""
    lars_eta: float = 1e-3
    """Trust coefficient of LARS (arXiv:1708.03888); Barlow Twins and VICReg 0.001, EMP-SSL 0.005,
    solo-learn on CIFAR 0.02."""
    lars_clip: bool = False
    """LARS never takes a larger step than SGD would (LARC); EMP-SSL has it."""
    bias_lr: float = 1.0
    """Learning rate of biases and normalisation layers as a share of `lr`; Barlow Twins' code has
    0.024 (0.0048 / 0.2)."""
    warmup_epochs: float = 10.0
    """Linear warm-up from 0."""
    final_lr: float = 1e-3
    """Learning rate at the end of the cosine, as a share of `lr`."""
    time_budget_s: float = 0.0
    """Seconds of training in which the schedule runs to its end, in place of `epochs`; 0: unset."""
    target_accuracy: float = 0.0
    """Stop when the online probe reaches it; 0: unset. Labels are read for the probe alone."""
    ramp_epochs: int = 0
    """Epochs over which views grow from `start_size` and `start_views` to their own."""
    start_size: int = 0
    """Side of a view in the first epoch of a ramp, in px; 0: `image_size`."""
    start_views: int = 0
    """Views of each image in the first epoch of a ramp; 0: `views`."""

    # execution
    seed: int = 0
    """Of the initial weights, of the order of images and of the views."""
    device: str = "auto"
    """'auto' takes the GPU where there is one; else any torch device."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the network under autocast; losses accumulate in float32 either way."""
    channels_last: bool = True
    """Memory layout of images and convolutions; faster on GPUs and on CPUs."""
    compile: bool = False
    """torch.compile the network and the objective; where that fails the run says so and goes on
    without."""
    cuda_graphs: bool = False
    """Compile with CUDA graphs (torch.compile's "reduce-overhead"), where shapes are fixed; needs
    `compile`."""
    sync_batchnorm: bool = False
    """Batch norm over all ranks' rows, so that W ranks take the step of one with the whole batch.
    """
    init: str = ""
    """A backbone.safetensors whose weights the backbone starts from."""
    init_partial: bool = False
    """Accept an `init` file that fills only some of the backbone's tensors."""

    # reports
    run: str = ""
    """Run folder; by default runs/RECIPE, with a number behind it where that one is taken."""
    log_every: int = 20
    """Steps between two readings of the metrics, the only syncs with the device."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does; it never reaches the weights."""
    stall_s: float = 10.0
    """A step over twice the usual time, and over this, prints its phase and stack."""
    probe_epochs: int = 0
    """Epochs between two online kNN probes of the backbone, whose time is not counted; 0: none."""
    checkpoint_s: float = 60.0
    """Seconds between two checkpoints; more where saving would take over 2 % of the time."""
    on_collapse: Literal["warn", "stop", "ignore"] = "warn"
    """What features that collapse to a point or a few directions do: warn with likely causes, end
    the run, or nothing."""
    knn_k: int = 20
    """Neighbours of the kNN classifier."""
    knn_temperature: float = 0.07
    """Temperature of its weights exp(cosine / temperature)."""
    label_draws: int = 10
    """Random draws of 1, 5 and 10 labels per class that low-label accuracies are averaged over."""

    def __post_init__(self) -> None:
        positive = (
            "load_size",
            "views",
            "image_size",
            "projector_width",
            "projector_layers",
            "batch_size",
            "epochs",
        )
        for name in (*positive, "accumulate", "log_every", "knn_k", "label_draws"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1"
                )
        if not 0 < self.holdout < 1:
            raise ValueError(f"--holdout is {self.holdout}: it must lie between 0 and 1")
        if self.render == "dali" and self.engine != "dali":
            raise ValueError(f"--render dali needs --engine dali, and it is {self.engine}")
        beton = self.engine == "auto" and self.data.endswith(".beton")
        if self.oriented and (self.engine == "ffcv" or beton):
            raise ValueError("--oriented: engine ffcv cannot turn images; use --engine dali")
        if not 0 <= self.corrupt_quota <= 1:
            raise ValueError(f"--corrupt-quota is {self.corrupt_quota}: it must lie in [0, 1]")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"--label-smoothing is {self.label_smoothing}: it must lie in [0, 1]")
        for name in ("global_batch", "time_budget_s", "ramp_epochs", "probe_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must not be negative"
                )
        if not 0 <= self.target_accuracy <= 1:
            raise ValueError(
                f"--target-accuracy is {self.target_accuracy}: give a share, such as 0.8"
            )
        if self.target_accuracy and not self.probe_epochs:
            raise ValueError("--target-accuracy needs --probe-epochs, such as 1")
        if (self.start_size or self.start_views) and not self.ramp_epochs:
            raise ValueError("--start-size and --start-views need --ramp-epochs")
        if not 0 <= self.start_size <= self.image_size:
            raise ValueError(f"--start-size is {self.start_size}: it must not exceed --image-size")
        if not 0 <= self.start_views <= self.views:
            raise ValueError(f"--start-views is {self.start_views}: it must not exceed --views")
        if self.compile and self.accumulate > 1:
            raise ValueError("--accumulate cannot be compiled; add --no-compile")
        if self.cuda_graphs and not self.compile:
            raise ValueError("--cuda-graphs needs --compile")
        if not self.stall_s > 0:
            raise ValueError(f"--stall-s is {self.stall_s}: it must be positive")
        if not self.lr > 0:
            raise ValueError(f"--lr is {self.lr}: it must be positive")
        if self.train_images < 0:
            raise ValueError(f"--train-images is {self.train_images}: it must be 0 (all) or more")
        self._check_method()
        self._check_optimizer()
        self._check_oracle()

    def _check_method(self) -> None:
        """The knobs of the method, of views, widths and weights."""
        method = METHODS[self.method]
        if self.views < method.min_views:
            raise ValueError(
                f"--views is {self.views}: {self.method} compares views, so it needs at least "
                f"{method.min_views}"
            )
        if self.views > method.max_views:
            raise ValueError(
                f"--views is {self.views}: {self.method} takes at most {method.max_views}"
            )
        if self.batch_size < 2:
            raise ValueError(
                "--batch-size is 1: batch statistics and every loss need at least 2 images"
            )
        for name in ("projector_width", "projector_out"):
            width = getattr(self, name)
            if name in method.knobs and not (16 <= width <= 16384 or (name, width) == _SAME_OUT):
                raise ValueError(
                    f"--{name.replace('_', '-')} is {width}: it must lie between 16 and 16384"
                )
        weights = ("lambd", "sim_coeff", "std_coeff", "cov_coeff", "orthogonality", "patch_coeff")
        for name in (*weights, "temperature", "eps_sq"):
            value, least = getattr(self, name), 0 if name in weights else None
            if value is not None and not (value > 0 or value == least):
                raise ValueError(
                    f"--{name.replace('_', '-')} is {value}: it must be "
                    f"{'positive' if least is None else '0 or more'}"
                )
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"--sample-rate is {self.sample_rate}: it must lie in (0, 1]")
        if self.method == "diet" and self.sample_rate < 1 and not self.fused_head:
            raise ValueError(
                f"--sample-rate is {self.sample_rate}: rows outside the sample keep their weight "
                "only with --fused-head"
            )

    def _check_optimizer(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum is {self.momentum}: it must lie in [0, 1)")
        for name in ("lars_eta", "bias_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be positive"
                )
        if self.fused_head and self.method != "diet":
            raise ValueError(f"--fused-head is for --method diet, not for {self.method}")
        if self.fused_head and self.optimizer == "lars":
            raise ValueError(
                "--fused-head updates by AdamW or SGD: --optimizer lars cannot be used"
            )
        if self.nesterov and self.momentum == 0:
            raise ValueError("--nesterov needs --momentum above 0")

    def _check_oracle(self) -> None:
        if self.oracle == "none":
            return
        if self.method not in ORACLE_METHODS:
            raise ValueError(
                f"--oracle {self.oracle} is for {', '.join(ORACLE_METHODS)}: {self.method} has no "
                "form with a similarity graph"
            )
        if not 0 < self.oracle_share <= 1:
            raise ValueError(f"--oracle-share is {self.oracle_share}: it must lie in (0, 1]")
        if self.oracle_queries < 1:
            raise ValueError(f"--oracle-queries is {self.oracle_queries}: it must be at least 1")


def method_defaults(method: str) -> dict[str, Any]:
    """What Config holds by default for each knob that `method` reads; None is tuned by width and
    views."""
    defaults = {field.name: field.default for field in fields(Config)}
    return {knob: defaults[knob] for knob in METHODS[method].knobs}


def config_to_json(config: Config) -> str:
    return json.dumps(asdict(config), indent=2)


def config_from_json(text: str) -> Config:
    """The Config of a `config.json`; ValueError names the knobs this version does not have."""
    values: dict[str, Any] = json.loads(text)
    unknown = sorted(set(values) - {field.name for field in fields(Config)})
    if unknown:
        raise ValueError(f"config.json has knobs this version does not know: {', '.join(unknown)}")
    return Config(**values)


def read_config(run: Path) -> Config:
    """The Config of a run folder."""
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.json")
    return config_from_json(path.read_text())
