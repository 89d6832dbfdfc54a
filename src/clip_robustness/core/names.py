"""What groups, families, data sets and sources are called, and how they look, wherever they are shown."""

# Okabe and Ito's palette, which stays apart under the common colour-vision deficiencies; the population
# that baselines are fitted on is grey, since it is the background of every comparison.
GROUPS = {
    "clip_zero_shot": ("CLIP, zero-shot", "#0072B2"),
    "clip_finetuned": ("CLIP, fine-tuned", "#56B4E9"),
    "standard": ("Standard", "#757575"),
    "more_data": ("More data", "#E69F00"),
    "self_supervised": ("Self-supervised", "#009E73"),
    "robust": ("Robust training", "#CC79A7"),
    "vlm": ("Vision-language model", "#D55E00"),
    "human": ("Human", "#000000"),
    "unlisted": ("Not in the models table", "#B8B8B8"),
}
FAMILIES = {
    "vit": ("ViT", "o"),
    "resnet": ("ResNet", "s"),
    "convnext": ("ConvNeXt", "^"),
    "other": ("Other", "D"),
}

# Data sets in the order in which they are shown.
NAMED = {
    "imagenet": "ImageNet",
    "imagenet_val": "ImageNet",
    "imagenet_v2": "ImageNet-V2",
    "imagenet_v2_matched_frequency": "ImageNet-V2",
    "imagenet_v2_threshold": "ImageNet-V2 (threshold 0.7)",
    "imagenet_v2_threshold07": "ImageNet-V2 (threshold 0.7)",
    "imagenet_v2_top": "ImageNet-V2 (top images)",
    "imagenet_v2_top_images": "ImageNet-V2 (top images)",
    "imagenet_r": "ImageNet-R",
    "imagenet_a": "ImageNet-A",
    "imagenet_sketch": "ImageNet-Sketch",
    "imagenet_x": "ImageNet-X",
    "objectnet": "ObjectNet",
    "imagenet_vid_robust": "Vid-Robust",
    "imagenet_vid_pm0": "Vid-Robust, pm-0",
    "imagenet_vid_pm10": "Vid-Robust, pm-10",
    "ytbb_robust": "YTBB-Robust",
    "ytbb_pm0": "YTBB, pm-0",
    "ytbb_pm10": "YTBB, pm-10",
    "stylized_imagenet": "Stylized-ImageNet",
    "imagenet_c": "ImageNet-C",
    "imagenet_greyscale": "Greyscale",
    "imagenet_pgd": "PGD",
    "mini_c": "Corruptions",
    "mini_pgd": "PGD",
    "imagenet_3dcc": "ImageNet-3DCC",
    "mini_3dcc": "3D corruptions",
    "navi": "NAVI",
    "scannet_pairs": "ScanNet",
    "spair": "SPair-71k",
    "mini_pairs": "Pairs of views",
    "imagenet_d": "ImageNet-D",
    "inaturalist": "iNaturalist",
    "sun": "SUN",
    "places": "Places",
    "textures": "Textures",
    "imagenet_o": "ImageNet-O",
    "ninco": "NINCO",
    "ninco_popular": "NINCO, popular sets",
    "coco": "COCO",
    "flickr30k": "Flickr30k",
    "natural_average": "Natural average",
}


def dataset_title(name: str) -> str:
    plain = name.removeprefix("mini_").replace("_", " ")
    return NAMED.get(name, plain[:1].upper() + plain[1:])


def source_title(name: str) -> str:
    """A training source as the models table names it; of a mini world, without what all of them share."""
    return name.removeprefix("mini_train_").replace("_", " ") or "unknown"
