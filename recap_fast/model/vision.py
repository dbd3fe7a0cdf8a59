"""Images in Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one adapter between them and everything else.

Text models have no adapter. `VisionAdapter` knows the positions of a row with images, packs the
images of a batch, and turns tokens and images into what the text model is called with. transformers
computes much of this from the images' sizes inside the model, where reading them waits for the
device; here it happens on the host, before the upload, with transformers' own functions.

Shapes: T tokens, I images, P patches of all images, D values of a patch, M image tokens (patches
merged by merge_size^2), H hidden size of the text model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recap_fast.model.attention import SDPA, Backend, build_layout
from recap_fast.model.attention_layout import AttentionLayout, Segment
from recap_fast.model.sharding import inside
from recap_fast.model.upload import upload
from recap_fast.types import ImageInput, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

# transformers hands the bounds of the images to implementations with "flash" in their name; for
# others it splits the patches by lengths that it reads from the device, in every layer.
_IMPLEMENTATION = "recap_packed_flash"


class VisionError(UserError):
    """Images that do not fit the model, or the row that they belong to."""


@dataclass(frozen=True, slots=True)
class PackedImages:
    """The images of one forward pass."""

    patches: tuple[Tensor, ...]  # [P_i, D] float32 of each image; laid end to end on the device
    grids: Tensor  # [I, 3] int64, patches along time, height and width; stays on the host
    token_index: Tensor  # [M] int64, positions of the image tokens among the batch's tokens
    tower: Mapping[str, Any]  # what the tower would compute from the grids
    layouts: Mapping[int, AttentionLayout]  # of images and of windows, by their number of bounds

    def to(self, device: torch.device) -> PackedImages:
        """The same on a device. Nothing waits for it."""

        def move(value: Any) -> Any:
            return upload(value, device) if isinstance(value, Tensor) else value

        return replace(
            self,
            patches=tuple(move(patches) for patches in self.patches),
            token_index=move(self.token_index),
            tower={name: move(value) for name, value in self.tower.items()},
            layouts={bounds: layout.to(device) for bounds, layout in self.layouts.items()},
        )


def is_vision_language(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration takes images here."""
    return config.model_type in MODEL_TYPES


def make_adapter(model: PreTrainedModel, attention: Backend = SDPA) -> VisionAdapter | None:
    """The adapter of a vision-language model; None for a text model.

    Args:
        attention: runs attention inside the vision tower.
    """
    return VisionAdapter(model, attention) if is_vision_language(model.config) else None


def tower_heads(config: PreTrainedConfig) -> tuple[int, int]:
    """Number and size of the attention heads in the vision tower."""
    vision = config.vision_config
    # Qwen2-VL's hidden_size is that of the text model.
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    return vision.num_heads, width // vision.num_heads


class VisionAdapter:
    """What differs between a vision-language model and a text model. Holds no state of its own.

    Making one exchanges two operations of the model for equal ones: the convolution over patches
    that do not overlap, for a matrix product, and Qwen3-VL's addition of image features in the
    first layers, for one that need not count the image tokens on the device.
    """

    def __init__(self, model: PreTrainedModel, attention: Backend = SDPA) -> None:
        self._model = model
        self._tower: Any = model.base_model.visual
        self._text: Any = model.base_model.language_model
        self._attention = attention
        self.image_token_id: int = model.config.image_token_id
        self.merge_size: int = model.config.vision_config.spatial_merge_size
        _register()
        self._tower.config._attn_implementation = _IMPLEMENTATION
        patch_embed = self._tower.patch_embed
        patch_embed.forward = MethodType(_embed_patches, patch_embed)
        if hasattr(self._text, "_deepstack_process"):
            self._text._deepstack_process = _add_features

    @property
    def tower(self) -> nn.Module:
        """The vision tower with its merger: what `model.train_vision` freezes or trains."""
        tower: nn.Module = self._tower
        return tower

    @property
    def token_cost(self) -> float:
        """What the tower takes for an image token, in passes of a token through the text model's
        layers: by their parameters, of which it has those of its blocks for each patch. A frozen
        tower has no backward pass, which takes twice the forward pass."""
        tower = list(self._tower.parameters())
        blocks = _num_parameters(self._tower.blocks.parameters())
        products = self.merge_size**2 * blocks + _num_parameters(tower) - blocks
        passes = 3 if any(parameter.requires_grad for parameter in tower) else 1
        return passes * products / (3 * _num_parameters(self._text.layers.parameters()))

    def num_tokens(self, image: ImageInput) -> int:
        """Image tokens by which an image stands in its row."""
        time, height, width = image.grid
        return time * height * width // self.merge_size**2

    def image_positions(self, token_ids: Sequence[int]) -> list[int]:
        """Indices of the image tokens."""
        return [i for i, token in enumerate(token_ids) if token == self.image_token_id]

    def check(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> None:
        """Raises `VisionError` where a prompt has not, for each image in turn, a run of as many
        image tokens as it makes. Something else must stand between two images."""
        wanted = [self.num_tokens(image) for image in images]
        is_image = (token == self.image_token_id for token in token_ids)
        given = [sum(run) for value, run in groupby(is_image) if value]
        if given != wanted:
            raise VisionError(
                f"its {len(images)} images make {_counted(wanted)}, but among its "
                f"{len(token_ids)} tokens stand {_counted(given)}"
            )

    def collapse(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> list[int]:
        """The tokens with one image token for each image, as engines take them that put in the
        rest themselves."""
        collapsed: list[int] = []
        rest, position = iter(images), 0
        while position < len(token_ids):
            collapsed.append(token_ids[position])
            is_image = token_ids[position] == self.image_token_id
            position += self.num_tokens(next(rest)) if is_image else 1
        return collapsed

    def positions(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> Tensor:
        """Positions along time, height and width of a prompt's tokens, [3, T] int64.

        A completion goes on, in all three, one past the largest.

        Raises:
            VisionError: the prompt's image tokens are not those of its images.
        """
        self.check(token_ids, images)
        if not images:
            return torch.arange(len(token_ids)).expand(3, -1)
        ids = torch.tensor([list(token_ids)])
        is_image = (ids == self.image_token_id).int()
        rope: Any = self._model.base_model
        positions, _ = rope.get_rope_index(
            ids, mm_token_type_ids=is_image, image_grid_thw=_grids(images)
        )
        result: Tensor = positions[:, 0]
        return result

    def pack(self, images: Sequence[ImageInput], token_index: Sequence[int]) -> PackedImages:
        """Collects the images of a batch, on the host.

        Args:
            images: in the order of their tokens.
            token_index: positions of all image tokens in the batch; in a batch of R rows of equal
                length, of the rows laid end to end.
        """
        grids = _grids(images)
        tower = self._tower_inputs(grids)
        bounds = {len(tower[name]): tower[name] for name in tower if name.startswith("cu_")}
        return PackedImages(
            patches=tuple(image.patches for image in images),
            grids=grids,
            token_index=torch.tensor(token_index),
            tower=tower,
            # As many windows as images means that each image is one window: one layout serves both.
            layouts={count: self._layout(starts) for count, starts in bounds.items()},
        )

    def _tower_inputs(self, grids: Tensor) -> dict[str, Any]:
        """Everything that the tower's forward derives from the grids, by the names of its keyword
        arguments (transformers.vision_utils)."""
        from transformers import vision_utils

        starts = vision_utils.get_vision_cu_seqlens(grids)
        inputs: dict[str, Any] = {
            "position_ids": vision_utils.get_vision_position_ids(grids, self.merge_size),
            "cu_seqlens": starts,
            "max_seqlen": _longest(starts),
        }
        tower = self._tower
        if hasattr(tower, "window_size"):
            index, starts = vision_utils.get_vision_window_index(
                grids, self.merge_size, tower.window_size, tower.patch_size
            )
            inputs |= {
                "window_index": index,
                "cu_window_seqlens": starts,
                "max_window_seqlen": _longest(starts),
            }
        if hasattr(tower, "pos_embed"):
            inputs |= self._interpolation(grids)
        return inputs

    def _interpolation(self, grids: Tensor) -> dict[str, Tensor]:
        """How learned positions are stretched to each image."""
        from transformers import vision_utils

        tower = self._tower
        if hasattr(vision_utils, "get_vision_interpolation_indices_and_weights"):
            indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grids,
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=self.merge_size,
            )
            return {"interp_indices": indices, "interp_weights": weights}
        # The name and layout of the first releases that are supported.
        indices, weights = vision_utils.get_vision_bilinear_indices_and_weights(
            grids, tower.num_grid_per_side, self.merge_size
        )
        return {"bilinear_indices": indices, "bilinear_weights": weights}

    def _layout(self, starts: Tensor) -> AttentionLayout:
        bounds = starts.tolist()
        segments = [
            Segment(range(0), range(start, stop))
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        return build_layout(segments, self._attention, causal=False)

    def embed(self, input_ids: Tensor, images: PackedImages) -> dict[str, Any]:
        """Arguments for the text model: its embeddings with the images' features in their places.

        Gradients reach the tower where its parameters ask for them.

        Args:
            input_ids: [R, L] int64.
        """
        trained = any(parameter.requires_grad for parameter in self._tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            output = self._tower(
                torch.cat(images.patches),
                grid_thw=images.grids,
                image_layouts=images.layouts,
                return_dict=True,
                **images.tower,
            )
        tokens = self._text.get_input_embeddings()(input_ids)
        features = output.pooler_output.to(tokens.dtype)
        flat = tokens.flatten(0, 1).index_copy(0, images.token_index, features)
        arguments = {"inputs_embeds": flat.view_as(tokens)}
        deeper = getattr(output, "deepstack_features", None)
        if deeper:
            arguments |= {
                "visual_pos_masks": images.token_index,
                "deepstack_visual_embeds": deeper,
            }
        return arguments

    def logits(
        self, input_ids: Tensor, images: PackedImages, *, logits_to_keep: int, **arguments: Any
    ) -> Tensor:
        """Logits of the last positions, [R, logits_to_keep, V].

        Args:
            input_ids: [R, L] int64.
            arguments: for the text model.
        """

        def run() -> Tensor:
            output = self._text(**self.embed(input_ids, images), **arguments)
            head = self._model.get_output_embeddings()
            logits: Tensor = head(output.last_hidden_state[:, -logits_to_keep:])
            return logits

        result: Tensor = inside(self._model, run)
        return result


def _num_parameters(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _counted(runs: Sequence[int]) -> str:
    each = "" if len(runs) < 2 else f" ({' + '.join(map(str, runs))})"
    return f"{sum(runs)} image tokens{each}"


def _grids(images: Sequence[ImageInput]) -> Tensor:
    return torch.tensor([image.grid for image in images])


def _longest(starts: Tensor) -> int:
    return int(starts.diff().max())


def _embed_patches(self: Any, patches: Tensor) -> Tensor:
    """[P, D] -> [P, hidden size of the tower]."""
    weight = self.proj.weight
    return nn.functional.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


def _add_features(hidden_states: Tensor, token_index: Tensor, features: Tensor) -> Tensor:
    """Adds the images' features to the hidden states [R, L, H] of their tokens."""
    flat = hidden_states.flatten(0, 1)
    return flat.index_add(0, token_index, features.to(flat.dtype)).view_as(hidden_states)


def _attend(
    module: nn.Module,
    query: Tensor,  # [1, heads, P, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    image_layouts: Mapping[int, AttentionLayout],
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within images, or windows. Returns ([1, P, heads, D], None)."""
    layout = image_layouts[len(cu_seq_lens_q)]
    tokens = (x[0].transpose(0, 1) for x in (query, key, value))  # [P, heads, D]
    return layout.attend(*tokens, scale=scaling, dropout=dropout)[None], None


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)
