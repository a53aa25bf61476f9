"""The config's section about data: where samples come from, which are used, and in which order."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data.filters import Buckets, Filters, Size, pixeldit_sizes, sdxl_sizes
from data.listing import IMAGE_EXTENSIONS
from data.sample import Crop
from data.store import StoreOptions
from t2i.config.base import PathText, Section, Unused


class CaptionConfig(Section):
    """Which words a sample trains on."""

    members: dict[str, float] = Field({"txt": 1.0})
    """Members that hold captions, or json:FIELD (a text or a list of texts), and their weights; each visit of a sample
    chooses one that it has."""
    min_words: int = 0
    """Captions with fewer words are skipped."""
    max_words: int | None = None
    """Captions with more words are skipped."""
    prefix_probability: float = 0.0
    """Probability that a short caption gets a prefix such as "A photo of"."""
    prefix_below_words: int = 30
    """Captions with fewer words are short."""


class SourceConfig(Section):
    """One set of WebDataset shards, or a folder of images with captions beside them."""

    name: str
    """Name of the source in ids, metrics and reports."""
    url: PathText
    """Directory or s3://bucket/prefix that holds the .tar shards (or image files)."""
    class_folders: bool = False
    """The images lie in one folder a class, as ImageNet's do; the folder's number, in order of names, is member cls."""
    index: PathText | None = None
    """Manifest written by launch/index.py; none takes index.json beside the shards, or indexes up to 1,000 of them."""
    heldout: PathText | None = None
    """Directory or s3:// prefix, with its own index.json, of the validation set; none: no validation on this source."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples drawn from this source, relative to the other sources' weights."""
    images: list[str] = Field(list(IMAGE_EXTENSIONS))
    """Extensions of image members; the first that a sample has is used."""
    captions: CaptionConfig = CaptionConfig()
    """Which words its samples train on."""
    metadata: str = "json"
    """Member with the fields that `fields` and json: captions name."""
    min_side: int = 0
    """Images with a shorter side, in pixels, are skipped."""
    max_aspect_ratio: float | None = None
    """Images whose longer side is more than this many times the shorter are skipped."""
    fields: dict[str, tuple[float | None, float | None]] = Field({})
    """Metadata fields and the range, ends included, that each must lie in; null leaves an end open."""
    endpoint: str | None = None
    """S3 endpoint URL; none takes AWS's."""
    region: str | None = None
    """S3 region; none takes the profile's."""
    profile: str | None = None
    """Profile of the AWS credentials file."""
    anonymous: bool = False
    """Read a public bucket without signing requests."""
    requester_pays: bool = False
    """Accept the charges for reading a requester-pays bucket."""
    licence: str = ""
    """Licence of the data, shown in the report."""
    credit: str = ""
    """Credit for the data, shown in the report."""

    @property
    def filters(self) -> Filters:
        return Filters(
            images=tuple(self.images),
            captions=self.captions.members,
            metadata=self.metadata,
            min_side=self.min_side,
            max_aspect_ratio=self.max_aspect_ratio,
            min_caption_words=self.captions.min_words,
            max_caption_words=self.captions.max_words,
            fields=self.fields,
            prefix_probability=self.captions.prefix_probability,
            prefix_below_words=self.captions.prefix_below_words,
        )

    @model_validator(mode="after")
    def _check_filters(self) -> SourceConfig:
        _ = self.filters  # checks itself
        return self


class DataConfig(Section):
    """Where samples come from and how they are ordered."""

    sources: list[SourceConfig] = Field([])
    """The sources, mixed by weight."""
    resolution: int | tuple[int, int] = 256
    """Pixels of the training images: the side of squares, or [height, width]; multiples of model.patch_size. With
    buckets, of the images of validation and scores."""
    buckets: Literal["none", "sdxl", "pixeldit"] | list[tuple[int, int]] = "none"
    """Aspect-ratio buckets: each image trains at the size whose shape is nearest its own. sdxl: SDXL's 40 sizes of
    about resolution x resolution pixels; pixeldit: PixelDiT's 7, of up to 1.15 times as many; or a list of [height,
    width]. Sides are multiples of model.patch_size."""
    group_size: Annotated[int, Unused(buckets="none")] = Field(8, gt=0)
    """Consecutive samples of one bucket: a multiple of train.micro_batch_size; lanes x group_size divides the batch
    size. Up to group_size - 1 samples wait in each bucket of each lane, and are part of the state."""
    small_images: Literal["drop", "upscale"] = "drop"
    """What happens to images with a side below the resolution's, or their bucket's."""
    crop: Crop = "center"
    """Which part of an image of another shape is used; adm: the middle square, resized as for ADM's reference
    statistics of ImageNet, at full decoding cost."""
    horizontal_flip: bool = False
    """Mirror half of the images at random; captions that say left or right become wrong."""
    lanes: int = Field(128, gt=0)
    """Independent orders that the data is split into. The number of ranks divides it; it divides the batch size."""
    shuffle_block: int = Field(4096, gt=0)
    """Samples that are permuted together inside a lane (tests/benchmarks/shuffle_quality.py measures how well)."""
    workers: int = Field(4, ge=0)
    """Decoding threads a rank."""
    buffer_gib: float = Field(16.0, gt=0)
    """GiB of encoded samples that a rank prefetches, at most; from S3, lanes / ranks x sources x shuffle_block
    samples."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of samples with bad content above which the run saves and stops; over all ranks, after 1,000 samples."""
    connect_timeout_s: float = Field(StoreOptions.connect_timeout_s, gt=0)
    """Seconds to wait for an S3 server's connection."""
    read_timeout_s: float = Field(StoreOptions.read_timeout_s, gt=0)
    """Seconds to wait for the next bytes of an S3 server."""
    retry_minutes: float = Field(StoreOptions.retry_minutes, ge=0)
    """Minutes without progress after which a failing read makes the run save and stop."""

    @field_validator("resolution", mode="before")
    @classmethod
    def _sides(cls, value: Any) -> Any:
        sides = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise ValueError("must be a side in pixels or [height, width], whole numbers above 0")
        return value

    @field_validator("buckets", mode="before")
    @classmethod
    def _known_buckets(cls, value: Any) -> Any:
        listed = isinstance(value, list) and all(isinstance(size, list | tuple) and len(size) == 2 for size in value)
        if value not in ("none", "sdxl", "pixeldit") and not (
            listed and all(type(side) is int for size in value for side in size)
        ):
            raise ValueError("must be none, sdxl, pixeldit or a list of [height, width], whole numbers of pixels")
        return value

    @model_validator(mode="after")
    def _buckets_fit(self) -> DataConfig:
        if self.buckets != "none" and not isinstance(self.resolution, int):
            raise ValueError(f"resolution {self.size_text} should be one side, since buckets give the shapes")
        if self.buckets != "none" and self.crop == "adm":
            raise ValueError("crop adm makes squares: set buckets to none, or crop to center or random")
        _ = self.aspect_buckets  # checks itself
        return self

    @model_validator(mode="after")
    def _adm_is_square(self) -> DataConfig:
        if self.crop == "adm" and self.size[0] != self.size[1]:
            raise ValueError(f"crop adm makes squares: give resolution one side (it is {self.size_text})")
        return self

    @property
    def size(self) -> Size:
        """Height and width of the training images, in pixels; with buckets, of validation's."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def aspect_buckets(self) -> Buckets | None:
        """The sizes of `buckets`, or None."""
        if self.buckets == "none":
            return None
        assert isinstance(self.resolution, int)
        tables = {"sdxl": sdxl_sizes, "pixeldit": pixeldit_sizes}
        sizes = tables[self.buckets](self.resolution) if isinstance(self.buckets, str) else tuple(self.buckets)
        return Buckets(sizes, self.group_size)

    @property
    def largest(self) -> Size:
        """Height and width of the training images that take the most memory."""
        sizes = self.aspect_buckets.sizes if self.aspect_buckets is not None else (self.size,)
        return max(sizes, key=lambda size: size[0] * size[1])

    @property
    def size_text(self) -> str:
        """`resolution` as text: 256 for squares, 256x384 for others."""
        return str(self.resolution) if isinstance(self.resolution, int) else "x".join(map(str, self.resolution))

    def store_options(self, source: SourceConfig) -> StoreOptions:
        return StoreOptions(
            endpoint=source.endpoint,
            region=source.region,
            profile=source.profile,
            anonymous=source.anonymous,
            requester_pays=source.requester_pays,
            connect_timeout_s=self.connect_timeout_s,
            read_timeout_s=self.read_timeout_s,
            retry_minutes=self.retry_minutes,
        )
