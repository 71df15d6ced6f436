"""The base model of a run: a complete folder in diffusers layout, of the right family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import ModelError
from helpers.families.loading import folder as files
from helpers.families.loading.components import load_component, outline, require_components, weight_files
from helpers.families.loading.finite import require_finite
from helpers.families.loading.hashes import WeightsHashes
from helpers.families.loading.integrity import settings_file
from helpers.families.loading.locate import locate
from helpers.families.loading.recognize import require_family
from helpers.storage.memo import Memo

if TYPE_CHECKING:
    from helpers.config.facts import FamilyFacts
    from helpers.config.options import CacheOptions, ModelOptions


@dataclass(frozen=True)
class BaseModel:
    """A base model whose files have been checked. Weights are only loaded by `load`."""

    name: str  # as the user named it
    folder: Path
    index: Mapping[str, Any]  # model_index.json
    variant: str | None
    hashes: WeightsHashes
    settings: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # of components that were asked for: names of layers ask often

    @classmethod
    def open(cls, family: FamilyFacts, components: Sequence[str], options: ModelOptions, cache: CacheOptions) -> BaseModel:
        """The base model, fetched if need be. Raises ModelError for another family, for one that lacks one of `components`,
        and for weights that are not finite."""
        name = options.pretrained_model_name_or_path
        found = locate(options, cache)
        index = files.model_index(found)
        require_family(found, index, family)
        used = [name for name in components if name != "vae" or not options.pretrained_vae_model_name_or_path]
        require_components(found, used, options.variant, options.needs_weights)
        others = options.pretrained_vae_model_name_or_path or options.pretrained_t5_model_name_or_path  # it may be meant for these
        if options.variant and options.needs_weights and not others and not any(found.glob(f"*/*.{options.variant}[.-]*")):
            raise ModelError(f"--variant={options.variant}: {found} has no weights of this variant; leave it out to take its own.")
        memo = Memo(cache.cache_dir / "memo")
        if options.needs_weights:
            for component in used:
                require_finite(weight_files(found / component, options.variant), memo)
        return cls(name, found, index, options.variant, WeightsHashes(memo))

    def require_finite(self, component: Path) -> None:
        """The same check for a component from another folder: ModelError for weights that are not finite."""
        require_finite(weight_files(component, self.variant), self.hashes.memo)

    def config(self, component: str) -> Mapping[str, Any]:
        """The settings of a component; those of a scheduler are its noise schedule."""
        if component not in self.settings:
            self.settings[component] = files.read_settings(self.folder / component / settings_file(component))
        return self.settings[component]

    def hash_of(self, *components: str) -> str:
        """A hash of the weights and settings of some components."""
        return self.hashes.hash_folders(*(self.folder / component for component in components))

    def load(self, kind: Any, component: str, dtype: Any) -> Any:
        """A component of this class, in this precision, on the CPU. If `dtype` is None, without weights, on the meta device."""
        if dtype is None:
            return outline(kind, self.folder / component, self.variant)
        return load_component(kind, self.folder, component, dtype, self.variant)
