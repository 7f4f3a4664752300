"""fastssl: fast self-supervised pretraining of vision backbones, judged by accuracy per minute."""
