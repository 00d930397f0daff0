"""Search through FAISS, for galleries that exact search takes too long on; faiss-cpu is the user's to install.

    tuwen eval predict --index faiss-ivf --probes 32 ...

`faiss` compares with every item, as `tuwen.search` does, but leaves ties to chance. `faiss-ivf` and `faiss-hnsw` are
approximate: they miss some of the best, fewer with more probes, so that figures found through them are lower bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tuwen.errors import MissingDependency

Matrix = npt.NDArray[np.float32]
FaissKind = Literal["faiss", "faiss-ivf", "faiss-hnsw"]

# Neighbours a node of the graph is linked with; FAISS's own default.
_HNSW_LINKS = 32
# Cells of an inverted file: FAISS's guidelines ask for 4 to 16 times the root of the number of items, and for at
# least 39 training vectors a cell, of which it uses at most 256.
_CELLS_PER_ROOT, _MIN_TRAINING, _MAX_TRAINING = 4, 39, 256


@dataclass(frozen=True)
class FaissIndex:
    """Which index, and how much it looks at.

    Attributes:
        probes: cells that faiss-ivf visits a query, or candidates that faiss-hnsw keeps.
    """

    kind: FaissKind = "faiss"
    probes: int = 32

    def top_k(
        self, query_embeds: Matrix, item_blocks: Iterable[Matrix], k: int
    ) -> tuple[Matrix, npt.NDArray[np.int64]]:
        """As `tuwen.search.top_k`; the whole gallery is held in memory.

        Raises:
            MissingDependency: faiss is not installed.
            ValueError: there are fewer than k items, the widths differ, or too few probes were made to find k.
        """
        faiss = _import_faiss()
        items = np.concatenate([*item_blocks])
        if len(items) < k:
            raise ValueError(f"k is {k}, expected 1..{len(items)}, the number of items")
        if items.shape[1] != query_embeds.shape[1]:
            raise ValueError(f"queries have D = {query_embeds.shape[1]}, items D = {items.shape[1]}")
        index = self._build(faiss, items)
        scores, indices = index.search(np.ascontiguousarray(query_embeds), k)
        if (indices < 0).any():
            raise ValueError(
                f"{self.kind} found fewer than {k} items for some query; raise --probes above {self.probes}"
            )
        return scores, indices

    def _build(self, faiss: Any, items: Matrix) -> Any:
        width = items.shape[1]
        if self.kind == "faiss":
            index = faiss.IndexFlatIP(width)
        elif self.kind == "faiss-ivf":
            num_cells = max(1, min(int(_CELLS_PER_ROOT * math.sqrt(len(items))), len(items) // _MIN_TRAINING))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, num_cells, faiss.METRIC_INNER_PRODUCT)
            step = max(1, len(items) // (_MAX_TRAINING * num_cells))
            index.train(np.ascontiguousarray(items[::step]))
            index.nprobe = min(self.probes, num_cells)
        else:
            index = faiss.IndexHNSWFlat(width, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = self.probes
        index.add(items)
        return index


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingDependency(f"--index faiss needs it: pip install 'tuwen[faiss]' ({error})") from None
    return faiss
