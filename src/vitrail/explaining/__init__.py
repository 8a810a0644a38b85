"""What a model looks at, what speaks for its answer, and what it has learned. `explain` shows it of pictures in files.

The others take normalised tensors and return tensors:

| function | shows | of |
|---|---|---|
| `attention_views` | where every head looks | ViT, V-MoE, CvT, CoAtNet |
| `patch_rollout` | what flows into the answer | ViT, V-MoE |
| `relevance` | what speaks for a class, by attention and its gradients | ViT, V-MoE |
| `grad_cam` | what speaks for a class, by features of convolutions | CvT, CoAtNet, EfficientNet, Wide-ResNet |
| `occlusion` | what a class loses where the picture is hidden | all |
| `expert_maps` | which expert took which patch | V-MoE |
| `attention_distance` | how far heads look | ViT, V-MoE |
| `position_similarity` | which positions are alike | ViT, V-MoE |
| `patch_filters` | what the first layer looks for | all |

Nothing here changes a model, which should be in evaluation mode: attention is computed a second time, beside the fused
kernels.
"""

from vitrail.explaining.attention import (
    attention_distance,
    attention_views,
    patch_rollout,
    pooling_views,
    pooling_weights,
    rollout,
)
from vitrail.explaining.experts import ExpertMap, expert_maps
from vitrail.explaining.explanation import ARRAYS, Explanation, PictureExplanation, explain
from vitrail.explaining.gradients import grad_cam, relevance
from vitrail.explaining.learned import patch_filters, position_similarity
from vitrail.explaining.methods import METHODS, choose_methods
from vitrail.explaining.occlusion import occlusion

__all__ = [
    "ARRAYS",
    "METHODS",
    "ExpertMap",
    "Explanation",
    "PictureExplanation",
    "attention_distance",
    "attention_views",
    "choose_methods",
    "expert_maps",
    "explain",
    "grad_cam",
    "occlusion",
    "patch_filters",
    "patch_rollout",
    "pooling_views",
    "pooling_weights",
    "position_similarity",
    "relevance",
    "rollout",
]
