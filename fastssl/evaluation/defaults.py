"""Names, sources and defaults of the evaluation that `--help` shows, without torch."""

RANKME_SAMPLES = 25_600  # enough according to arXiv:2210.02885, appendix G
LIDAR_IMAGES, LIDAR_VIEWS = 1000, 50  # arXiv:2312.04000, section 4
CAVEAT = (
    "Compares runs of one method on one data set; a high rank is necessary, not sufficient. "
    "RankMe's rank correlation with the probe was 0.32 on VICReg, LiDAR's 0.92 (arXiv:2312.04000); "
    "selected by RankMe, DINO's learning rate was the worst of its pool, 63.6 of 63.6 to 69.1 "
    "(IdEst). Rank inflates early in training: do not use it for early stopping."
)
PROBE_NAMES = ("lbfgs", "ridge", "sgd")  # those of probes.PROBES
PROTOCOL_SOURCES = {  # those of protocols.PROTOCOLS
    "neutral": "one centre view, the backbone's features; L-BFGS",
    "multiview": "arXiv:2312.10725: the image and 15 augmented views, averaged; Adam 1e-3, 200 "
    "epochs, batch 512, label smoothing 0.1 (for 50,000 images; too few steps on a few thousand: "
    "use --probe lbfgs)",
    "patches": "arXiv:2304.03977: 128 augmented patches, averaged, on the projector's first layer "
    "after its ReLU; SGD 0.03, 100 epochs, batch 100, weight decay 5e-5",
}
