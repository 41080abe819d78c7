"""The values of well-known libraries, once the session has imported them: shape, types and a corner, never the whole.

A type is known by being the very object in the library's namespace; a class that only calls itself ``numpy.ndarray`` is
not believed. Subclasses and lazy frames are not looked into.
"""

import sys
from typing import Any, Callable, Dict, Sequence

from .describe import LIMIT, SMALL, Describer, Description, class_name, clean, is_kind, looks_secret

ROWS, COLUMNS = 10, 20
"""Corner of a table that is shown."""


class LibraryDescriber(Describer):
    """A :class:`Describer` that also knows decimal, fractions, numpy, pandas, polars, pyarrow and torch."""

    def __init__(self, secrets: Sequence[str] = (), mask: bool = True) -> None:
        super().__init__(secrets, mask)
        self._waiting: Dict[str, Callable[[Dict[str, Any]], None]] = {
            "decimal": self._register_decimal,
            "fractions": self._register_fractions,
            "numpy": self._register_numpy,
            "pandas": self._register_pandas,
            "polars": self._register_polars,
            "pyarrow": self._register_pyarrow,
            "torch": self._register_torch,
        }

    def learn(self) -> None:
        """Take in the types of libraries that have been imported since."""
        for root in list(self._waiting):
            module = sys.modules.get(root)
            if module is not None:
                try:
                    self._waiting[root](vars(module))
                except Exception:
                    continue  # half imported; the next cell finds it whole
                del self._waiting[root]

    def _register_decimal(self, decimal: Dict[str, Any]) -> None:
        number = decimal["Decimal"]

        def describe(value: Any) -> Description:
            return {"value": str(value) if number.__sizeof__(value) <= LIMIT else f"<{class_name(number)} object>"}

        self.know(describe, [number], self.inline)

    def _register_fractions(self, fractions: Dict[str, Any]) -> None:
        def describe(value: Any) -> Description:
            return {"value": f"{self.brief(value.numerator, SMALL)}/{self.brief(value.denominator, SMALL)}"}

        self.know(describe, [fractions["Fraction"]], self.inline)

    def _register_numpy(self, numpy: Dict[str, Any]) -> None:
        ndarray = numpy["ndarray"]

        def array(value: Any) -> Description:
            shape, dtype = value.shape, value.dtype
            found: Description = {"shape": list(shape), "dtype": self.cut(str(dtype), SMALL), "size": value.nbytes}
            if dtype.kind not in "biufcmMSU" or dtype.itemsize > LIMIT or value.ndim > 4:
                found["value"] = f"<array of {found['dtype']} of shape {shape}>"
                return found
            corner = ndarray.__getitem__(value, tuple(slice(0, ROWS) for _ in shape)).view(ndarray)
            text = self.brief(corner.tolist() if dtype.kind not in "mM" else corner.astype(str).tolist())
            text = text.replace("], [", "],\n [")
            found["value"] = text if corner.shape == shape else f"{text[: LIMIT - 4]}\n..."
            return found

        def scalar(value: Any) -> Description:
            text = str(value) if value.dtype.kind in "mM" else self.brief(value.item())
            return {"value": text, "dtype": str(value.dtype)}

        self.know(array, [ndarray, numpy["memmap"]], self.shaped)
        classes = [cls for cls in numpy.values() if is_kind(type(cls), type) and is_kind(cls, numpy["generic"])]
        self.know(scalar, [cls for cls in classes if cls not in (numpy["object_"], numpy["void"])], self.inline)

    def _register_pandas(self, pandas: Dict[str, Any]) -> None:
        def frame(value: Any) -> Description:
            shape = value.shape
            head = value.iloc[:ROWS, :COLUMNS]
            rows = head.to_numpy(dtype=object).tolist()
            text = self.table(rows, head.columns.tolist(), head.index.tolist())
            found: Description = {"value": text if shape[0] <= ROWS else f"{text}\n...", "shape": list(shape)}
            names = zip(head.columns.tolist(), head.dtypes.tolist())  # noqa: B905 - Python 3.9 has no `strict`
            found["dtypes"] = {clean(self.hide(self.cell(name))): clean(str(dtype)[:SMALL]) for name, dtype in names}
            return found

        def series(value: Any) -> Description:
            head = value.iloc[:ROWS]
            name = head.name
            hidden = self.mask and type(name) is str and looks_secret(name)
            items = [["***" if hidden else item] for item in head.to_numpy(dtype=object).tolist()]
            text = self.table(items, [], head.index.tolist())
            more = "" if len(value) <= ROWS else "\n..."
            return {"value": text + more, "shape": list(value.shape), "dtype": str(value.dtype)[:SMALL]}

        def index(value: Any) -> Description:
            text = self.brief(value[:ROWS].tolist())
            return {"value": text, "shape": [len(value)], "dtype": str(value.dtype)[:SMALL]}

        self.know(frame, [pandas["DataFrame"]], self.shaped)
        self.know(series, [pandas["Series"]], self.shaped)
        self.know(index, [pandas["Index"], pandas["RangeIndex"], pandas["DatetimeIndex"]], self.shaped)
        scalars = [pandas["Timestamp"], pandas["Timedelta"], type(pandas["NaT"]), type(pandas["NA"])]
        self.know(self.scalar, scalars, self.inline)

    def _register_polars(self, polars: Dict[str, Any]) -> None:
        def frame(value: Any) -> Description:
            head = value[:ROWS, :COLUMNS]
            text = self.table(head.rows(), head.columns, range(len(head)))
            return {"value": text if len(value) <= ROWS else f"{text}\n...", "shape": list(value.shape)}

        def series(value: Any) -> Description:
            text = self.brief(value[:ROWS].to_list())
            return {"value": text, "shape": [len(value)], "dtype": str(value.dtype)[:SMALL]}

        self.know(frame, [polars["DataFrame"]], self.shaped)
        self.know(series, [polars["Series"]], self.shaped)

    def _register_pyarrow(self, pyarrow: Dict[str, Any]) -> None:
        def table(value: Any) -> Description:
            columns = ", ".join(map(str, value.column_names[:COLUMNS]))
            return {"value": self.cut(f"columns: {columns}", LIMIT), "shape": list(value.shape)}

        self.know(table, [pyarrow["Table"], pyarrow["RecordBatch"]], self.shaped)

    def _register_torch(self, torch: Dict[str, Any]) -> None:
        def tensor(value: Any) -> Description:
            shape, dtype = list(value.shape), str(value.dtype)
            text = f"<tensor of shape {tuple(shape)}, {dtype}, on {value.device}>"
            return {"value": text, "shape": shape, "dtype": dtype}

        self.know(tensor, [torch["Tensor"], torch["nn"].Parameter], self.shaped)
