"""The names of all rewards and judges, the sets of weights that each reads, and the pinned commits. No torch."""

from __future__ import annotations

PINNED = {  # set of weights -> its address, unless the config gives another
    "dfn-clip": "hub:apple/DFN5B-CLIP-ViT-H-14@5c8f2637bc994346b98cc52a3f752b8abc632ca7/open_clip_pytorch_model.bin",
    "hpsv2.1": "hub:xswu/HPSv2@697403c78157020a1ae59d23f111aa58ced35b0a/HPS_v2.1_compressed.pt",
    "pickscore": "hub:yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800",
    "aesthetic": "hub:trl-lib/ddpo-aesthetic-predictor@cf4bd10345610935a80a5d3be9a3133c50f121e4/aesthetic-model.pth",
    "clip-vit-large-patch14": "hub:openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41",
    "imagereward": "hub:zai-org/ImageReward@5736be03b2652728fb87788c9797b0570450ab72/ImageReward.pt",
    "bert-vocabulary": "hub:google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594/vocab.txt",
    "clip-score": "hub:laion/CLIP-ViT-g-14-laion2B-s12B-b42K@4b0305adc6802b2632e11cbe6606a9bdd43d35c9/"
    "open_clip_pytorch_model.bin",
}
LAB, FASHION = ("lab-conv", "lab-mixer"), ("fashion-conv", "fashion-mixer")
OF_REWARD = {  # reward -> the sets of weights that it reads; the lab's rewards come with DMDR
    "dfn-clip": ("dfn-clip",),
    "hpsv2.1": ("hpsv2.1",),
    "pickscore": ("pickscore",),
    "aesthetic": ("aesthetic", "clip-vit-large-patch14"),
    "imagereward": ("imagereward", "bert-vocabulary"),
    "clip-score": ("clip-score",),
    "clip-score-dmd2": ("clip-score",),
    **dict.fromkeys((*LAB, *FASHION), ()),
}
GENEVAL = ("mask2former", "clip-vit-l-14")
# reward without a gradient that checks an image against what its prompt asks for -> the sets of weights that it reads
VERIFIERS = {
    "geneval": GENEVAL,
    "geneval-soft": GENEVAL,
    "ocr": (),
    "lab-checker": (),
    "lab-checker-soft": (),
}
FIGURES = {  # verifier -> the figures of a scorecard that measure the same, unless it is the figure of its own name
    "geneval-soft": ("geneval",),
    **dict.fromkeys(("lab-checker", "lab-checker-soft"), ("strict", "soft")),
}
BLIND = frozenset({"aesthetic", *VERIFIERS})  # rewards that do not read the words before a prompt
OF_JUDGE = {  # metric that is not a reward -> what it reads: weights or a file of questions, which the config must name
    "geneval": GENEVAL,
    "ocr": (),
    "dpg-bench": ("dpg-questions", "vqa"),
    "lpips": ("lpips-vgg16",),
}
OF = OF_REWARD | VERIFIERS | OF_JUDGE
