"""Whether a pickle is harmless, by what it names. Nothing is ever run, whatever the verdict.

`safe`: every global is in the table of known-good ones, whose meaning ptbin knows. `unknown`: there
are others, a model's own classes say; they stay inert. `unsafe`: a name that can only be meant to run
code or reach the system, or a construction that hides from parsers. The table of good names decides
what may be *understood*; the table of bad ones only decides what is *refused by default*, so a name
missing from it costs a refusal, never an execution.

Sources: the allow list of torch/_weights_only_unpickler.py; bypass lists in the advisories of
picklescan and modelscan; CPython's own module index for what reaches the system.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ptbin.dtypes import BY_NAME, BY_STORAGE_CLASS
from ptbin.nodes import Global, Instance
from ptbin.reading.pickle_machine import PickleProgram

__all__ = ["GlobalVerdict", "SafetyReport", "judge_global", "judge_programs"]

MAX_FINDINGS = 1000

Verdict = Literal["safe", "unknown", "unsafe"]

# Python 2 names of builtins modules (CPython, Lib/_compat_pickle.py)
_RENAMED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "exceptions": "builtins",
    "commands": "subprocess",
}

_TENSOR_CLASSES = frozenset(name.removesuffix("Storage") + "Tensor" for name in BY_STORAGE_CLASS)

_SAFE_NAMES: dict[str, frozenset[str]] = {
    "builtins": frozenset(
        "dict list tuple set frozenset int float complex bool "
        "str bytes bytearray slice range object long unicode".split()
    ),
    "collections": frozenset(["OrderedDict", "defaultdict", "Counter", "deque"]),
    "copyreg": frozenset(["_reconstructor", "__newobj__"]),
    "_codecs": frozenset(["encode"]),
    "datetime": frozenset("datetime date time timedelta timezone".split()),
    "decimal": frozenset(["Decimal"]),
    "fractions": frozenset(["Fraction"]),
    "uuid": frozenset(["UUID"]),
    "pathlib": frozenset("Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath".split()),
    "pathlib._local": frozenset("Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath".split()),
    "argparse": frozenset(["Namespace"]),
    "types": frozenset(["SimpleNamespace"]),
    "numpy": frozenset(["dtype", "ndarray"]),
    "numpy.core.multiarray": frozenset(["_reconstruct", "scalar"]),
    "numpy._core.multiarray": frozenset(["_reconstruct", "scalar"]),
    "numpy.core.numeric": frozenset(["_frombuffer"]),
    "numpy._core.numeric": frozenset(["_frombuffer"]),
    "torch": frozenset(
        [
            *BY_NAME,
            *BY_STORAGE_CLASS,
            "Size",
            "Tensor",
            "device",
            "per_tensor_affine",
            "per_tensor_symmetric",
            "per_channel_affine",
            "per_channel_symmetric",
            "per_channel_affine_float_qparams",
            *_TENSOR_CLASSES,
        ]
    ),
    "torch.cuda": frozenset([*BY_STORAGE_CLASS, *_TENSOR_CLASSES]),
    "torch.autograd.variable": frozenset(["Variable"]),
    "torch.storage": frozenset(
        ["UntypedStorage", "_UntypedStorage", "TypedStorage", "_TypedStorage", "_load_from_bytes"]
    ),
    "torch.serialization": frozenset(["_get_layout"]),
    "torch.layout": frozenset(["torch.strided", "torch.sparse_coo", "torch.sparse_csr"]),
    # What `.metadata` of torch.distributed.checkpoint consists of; records without behaviour.
    "torch.distributed.checkpoint.metadata": frozenset(
        [
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ]
    ),
    "torch.distributed.checkpoint.filesystem": frozenset(["_StorageInfo"]),
    "torch.distributed._shard.sharded_tensor.metadata": frozenset(
        ["MEM_FORMAT_ENCODING", "TensorProperties"]
    ),
    "torch.nn.parameter": frozenset(["Parameter", "Buffer", "UninitializedParameter", "UninitializedBuffer"]),
    "torch._tensor": frozenset(["_rebuild_from_type", "_rebuild_from_type_v2"]),
    "torch.tensor": frozenset(["_rebuild_from_type", "_rebuild_from_type_v2"]),
    "torch.nn.backends.thnn": frozenset(["_get_thnn_function_backend"]),
    "torch._utils": frozenset(
        [
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
            "_rebuild_qtensor",
            "_rebuild_sparse_tensor",
            "_rebuild_sparse_csr_tensor",
            "_rebuild_device_tensor_from_numpy",
            "_rebuild_device_tensor_from_cpu_tensor",
            "_rebuild_meta_tensor_no_storage",
            "_rebuild_nested_tensor",
            "_rebuild_wrapper_subclass",
            "_rebuild_xla_tensor",
        ]
    ),
}

# A class under these packages, in CamelCase, is a layer or an optimizer of torch's own.
_SAFE_CLASS_PACKAGES = (
    "torch.nn.modules.",
    "torch.optim.",
    "torch.nn.quantized.",
    "torch.ao.nn.",
    "torch.nn.qat.",
)

_UNSAFE_BUILTINS = frozenset(
    "eval exec execfile compile open file input raw_input __import__ breakpoint globals locals vars apply "
    "setattr delattr help exit quit reload".split()
)

# Top-level modules whose every function is one way or another to run code or reach the system.
_UNSAFE_MODULES = frozenset(
    """
    os posix nt ntpath posixpath sys subprocess _posixsubprocess pty shutil socket _socket socketserver
    ssl signal ctypes _ctypes cffi mmap fcntl resource select selectors asyncio multiprocessing
    concurrent threading importlib imp runpy pkgutil zipimport zipapp site sitecustomize usercustomize
    sysconfig code codeop pdb bdb cProfile profile trace timeit doctest unittest pydoc pydoc_data
    webbrowser antigravity idlelib lib2to3 turtledemo pip ensurepip venv setuptools distutils
    pkg_resources wheel urllib urllib2 urllib3 requests http httplib httpx aiohttp ftplib smtplib
    telnetlib imaplib poplib nntplib xmlrpc paramiko fabric pexpect psutil sh plumbum invoke tempfile
    fileinput glob io _io _pyio shelve dbm sqlite3 pickle _pickle cPickle jsonpickle marshal linecache
    inspect gc faulthandler tracemalloc platform getpass crypt pwd grp spwd readline rlcompleter
    py_compile compileall symtable dis ast tokenize cgitb cgi wsgiref _osx_support _aix_support _pyrepl
    winreg _winreg msilib nis syslog ossaudiodev tkinter turtle IPython ipykernel nbformat jupyter
    _thread thread dummy_threading atexit _winapi _interpreters _xxsubinterpreters _xxinterpchannels
    _testcapi _imp _frozen_importlib _frozen_importlib_external mailcap pipes zipfile tarfile gzip bz2
    lzma wave asyncore asynchat smtpd uu BaseHTTPServer SocketServer SimpleHTTPServer xmlrpclib httplib2
    numexpr sympy fire jinja2 mako pyximport cython cffi_backend _cffi_backend pywin win32api win32com
    nose pytest
    """.split()
)

# Of these only the module itself is judged: people's own packages are called like that, too.
_COMMON_NAMES = frozenset(
    "code profile trace select sh invoke fabric platform inspect signal dis site test".split()
)

_UNSAFE_PATHS = (
    "logging.config",
    "logging.FileHandler",
    "logging.handlers",
    "functools.reduce",
    "builtins.reduce",
    "weakref.finalize",
    "dataclasses._create_fn",
    "typing._eval_type",
    "typing.get_type_hints",
    "operator.call",
    "_operator.call",
    "codecs.open",
    "test.support",
    "torch.jit.unsupported_tensor_ops",
    "torch.multiprocessing",
    "torch.distributed.elastic",
    "torch.fx.graph_module._exec_with_source",
    "torch.fx.graph_module._forward_from_src",
    "torch.export.load",
    "torch._ops",
    "numpy.save",
    "numpy.loadtxt",
    "numpy.genfromtxt",
    "numpy.core.multiarray.fromfile",
    "numpy._core.multiarray.fromfile",
    "numpy.rec",
    "numpy.core.records",
    "pandas.eval",
    "hydra.utils",
    "cloudpickle.cloudpickle.loads",
    "cloudpickle.cloudpickle.subprocess",
    "dill._dill._import_module",
    "dill._dill._eval_repr",
    "keras.models.load_model",
    "itertools.starmap",
    "operator.attrgetter",
    "operator.methodcaller",
    "operator.itemgetter",
    "_operator.attrgetter",
    "_operator.methodcaller",
    "_operator.itemgetter",
    "types.CodeType",
    "types.FunctionType",
    "types.MethodType",
    "types.LambdaType",
    "types.ModuleType",
    "torch.load",
    "torch.save",
    "torch.hub",
    "torch.jit.load",
    "torch.serialization.load",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "torch.utils.bottleneck",
    "torch.utils.collect_env",
    "torch.utils._config_module",
    "torch.utils.data.datapipes.utils.decoder",
    "torch._inductor",
    "torch._dynamo.guards",
    "torch._dynamo.utils",
    "torch.distributed.rpc",
    "torch.distributed.launcher",
    "torch.distributed.run",
    "torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression",
    "torch.package",
    "torch.cuda._dynamic",
    "torch.ops",
    "torch.classes",
    "torch.testing",
    "torch._C._load",
    "torch._C._jit",
    "torch._C.import",
    "torch._C.PyTorchFileReader",
    "torch._C.PyTorchFileWriter",
    "torch._C._distributed",
    "numpy.load",
    "numpy.fromfile",
    "numpy.memmap",
    "numpy.testing",
    "numpy.f2py",
    "numpy.distutils",
    "numpy.ctypeslib",
    "numpy.lib.npyio",
    "numpy.lib._npyio_impl",
    "numpy.savetxt",
    "numpy.DataSource",
    "joblib.load",
    "joblib.numpy_pickle",
    "pandas.read_pickle",
    "pandas.io",
    "cloudpickle.loads",
    "cloudpickle.load",
    "dill.loads",
    "dill.load",
    "dill._dill.loads",
    "copyreg.extension",
    "yaml.load",
    "yaml.unsafe_load",
    "uuid._get_command_stdout",
    "uuid._popen",
)

_CLOUDPICKLE = ("cloudpickle.cloudpickle", "cloudpickle.cloudpickle_fast")

_UNSAFE_PARTS = frozenset(
    "__globals__ __builtins__ __import__ __subclasses__ __bases__ __mro__ __code__ __class__ __dict__ "
    "__getattribute__ __reduce__ __reduce_ex__ __loader__ __spec__ "
    # frames and code objects, by which a function leads to the globals around it (CPython, Lib/inspect.py)
    "f_globals f_builtins f_locals f_back f_code gi_frame gi_code cr_frame cr_code ag_frame ag_code tb_frame "
    "tb_next func_globals func_code".split()
)

# Types of builtins whose methods people pickle (`str.lower` in a configuration, say) and that reach nothing.
_PLAIN_TYPES = frozenset("dict list tuple set frozenset int float complex bool str bytes bytearray".split())

# What a longer chain of getattr calls than this is for is nobody's model.
MAX_ATTRIBUTE_STEPS = 16


@dataclass(frozen=True, slots=True)
class GlobalVerdict:
    module: str
    name: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class SafetyReport:
    """Verdict over all pickles of one checkpoint, with what led to it."""

    verdict: Verdict
    globals: tuple[GlobalVerdict, ...]
    findings: tuple[str, ...]

    def to_json(self) -> list[dict[str, str]]:
        return [{"module": g.module, "name": g.name, "verdict": g.verdict} for g in self.globals]


# Members of such modules that whole pickled modules do hold, and that only name a constant or a path rule.
_HARMLESS = {
    "inspect": frozenset(["_empty", "Parameter", "Signature", "_ParameterKind"]),
    "signal": frozenset(["Signals", "Handlers"]),
    "posixpath": frozenset(["join", "basename", "dirname", "splitext"]),
    "io": frozenset(["BytesIO", "StringIO"]),
    "_io": frozenset(["BytesIO", "StringIO"]),
}


def _names_unsafe_path(path: str) -> bool:
    return any(path == bad or path.startswith((f"{bad}.", f"{bad}:")) for bad in _UNSAFE_PATHS)


def judge_global(module: str, name: str) -> Verdict:
    """The verdict on one global."""
    top, _, rest = module.partition(".")
    normal = _RENAMED.get(top, top) + (f".{rest}" if rest else "")
    if name in _SAFE_NAMES.get(normal, ()):
        return "safe"
    if normal == "builtins":
        if name in ("getattr", "hasattr", "type", "super", "property", "print", "map", "filter", "zip"):
            return "unknown"  # judged by their arguments, see `_judge_call`
        return "unsafe" if name in _UNSAFE_BUILTINS or "." in name else "unknown"
    path = f"{normal}.{name}"
    if path in ("io.BytesIO", "_io.BytesIO", "io.StringIO", "_io.StringIO"):
        return "unknown"  # buffers in memory; some layers keep their extra state in one
    first, _, inside = normal.partition(".")
    if first in _COMMON_NAMES:
        if not inside and name not in _HARMLESS.get(first, ()):
            return "unsafe"
    elif first in _UNSAFE_MODULES and name not in _HARMLESS.get(normal, ()):
        return "unsafe"
    if _names_unsafe_path(path):
        return "unsafe"
    # Protocol 4 lets a name walk attributes ("nn.modules.os.system"): every step counts.
    steps = name.split(".")
    if any(step in _UNSAFE_PARTS for step in [*normal.split("."), *steps]):
        return "unsafe"
    if steps[-1] in ("system", "popen") or (
        len(steps) > 1 and any(step in _UNSAFE_MODULES for step in steps)
    ):
        return "unsafe"
    if len(steps) > 1 and any(_names_unsafe_path(".".join(steps[start:])) for start in range(len(steps) - 1)):
        return "unsafe"
    if module.startswith("__torch__"):
        return "safe"  # TorchScript's own namespace, resolved inside the archive and never imported
    if path.startswith(_SAFE_CLASS_PACKAGES) and name[:1].isupper() and "." not in name:
        return "safe"
    return "unknown"


def _judge_call(callee: Any, args: Any) -> str | None:
    """What is wrong with a call no reducer explains; None when nothing is."""
    if isinstance(callee, Instance) and callee.class_path == "functools.partial":
        return None  # how protocol 2 writes constructors with keyword arguments (CPython, Lib/pickle.py)
    if isinstance(callee, Instance) and _is_class_by_value(callee):
        return None
    if isinstance(callee, Instance) and _is_getattr(callee.cls):
        # A nested class, or an enum inside a class: judged by its path when getattr was called for it.
        if _attribute_path(callee.args) is None:
            return "a call of what getattr took from a value"
        return None
    if not isinstance(callee, Global):
        return f"a call of a value ({type(callee).__name__}) instead of a name"
    if _is_getattr(callee):
        return _judge_getattr(args)
    return None


def _is_getattr(callee: Any) -> bool:
    return (
        isinstance(callee, Global)
        and callee.name == "getattr"
        and _RENAMED.get(callee.module, callee.module) == "builtins"
    )


def _judge_getattr(args: Any) -> str | None:
    """What is wrong with an attribute that a pickle asks for.

    Protocol 2 has no other way to name a nested class, an enum's member or a bound method (CPython,
    Lib/pickle.py, `save_global`); protocol 4 writes the same as one dotted name, and it is judged as that.
    """
    target, name = (args[0], args[1]) if isinstance(args, tuple) and len(args) >= 2 else (None, None)
    # A dunder, or a name that is computed or walks further, is no attribute that a pickler writes.
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("__"):
        return "getattr of a special or computed name"
    if name in ("system", "popen") or name in _UNSAFE_PARTS:
        return "getattr of a special or computed name"
    path = _attribute_path(args)
    if path is None:
        # A bound method of an object is harmless to hold; a call of it is judged as a call of a value.
        return "a long chain of getattr calls" if _chain_length(target) > MAX_ATTRIBUTE_STEPS else None
    module, steps = path
    if _judge_attribute(module, steps) == "unsafe":
        return f"getattr of {module}.{'.'.join(steps)}"
    return None


def _is_chain(target: Any) -> bool:
    return isinstance(target, Instance) and _is_getattr(target.cls)


def _chain_length(target: Any) -> int:
    length = 0
    while _is_chain(target) and isinstance(target.args, tuple) and target.args:
        if length > MAX_ATTRIBUTE_STEPS:
            break
        length += 1
        target = target.args[0]
    return length


def _attribute_path(args: Any) -> tuple[str, list[str]] | None:
    """Module and dotted name of what getattr calls on a global lead to; None for any other target."""
    steps: list[str] = []
    while isinstance(args, tuple) and len(args) >= 2 and isinstance(args[1], str):
        target, name = args[:2]
        steps.append(name)
        if len(steps) > MAX_ATTRIBUTE_STEPS:
            return None
        if isinstance(target, Global):
            return target.module, [*target.name.split("."), *reversed(steps)]
        if not _is_chain(target):
            return None
        args = target.args
    return None


def _judge_attribute(module: str, steps: list[str]) -> Verdict:
    """The verdict on an attribute of a global, by its whole path.

    Every step on the way counts by its name: a module that another one imports (`mymodel.subprocess`, or
    `random._os`) is a global like any other until something is taken from it.
    """
    top, _, rest = module.partition(".")
    if _RENAMED.get(top, top) == "builtins" and not rest:
        return "unknown" if len(steps) == 2 and steps[0] in _PLAIN_TYPES else "unsafe"
    *way, last = steps
    if any(step.lstrip("_") in _UNSAFE_MODULES or step.startswith("__") for step in way):
        return "unsafe"
    # A class has methods (`Net.compile`) and members (`Scheme.http`) of names that are dangerous in a module
    # (`io.open`). By its place a class and a module look alike; by their names classes do not (PEP 8).
    if way[-1].lstrip("_")[:1].isupper() or last in _COMMON_NAMES:
        if _names_unsafe_path(f"{module}.{'.'.join(steps)}"):
            return "unsafe"
        return judge_global(module, ".".join(way))
    if last in _UNSAFE_BUILTINS:
        return "unsafe"
    return judge_global(module, ".".join(steps))


def _is_class_by_value(callee: Instance) -> bool:
    """A class that cloudpickle wrote out whole, or the type of the code of its methods.

    So notebooks and scripts pickle what they define themselves, and MLflow's PyTorch flavour always does. A
    *function* that was written out and is called by the pickle itself stays what it is: code that is run.
    """
    package, _, made_by = (callee.class_path or "").rpartition(".")
    if package not in _CLOUDPICKLE:
        return False
    if made_by in ("_make_skeleton_class", "_make_skeleton_enum"):
        return True
    return made_by == "_builtin_type" and callee.args == ("CodeType",)


def judge_programs(programs: Iterable[PickleProgram]) -> SafetyReport:
    """One verdict for all pickles of a checkpoint."""
    verdicts: dict[tuple[str, str], GlobalVerdict] = {}
    findings: dict[str, None] = {}
    for program in programs:
        for module, name in program.globals:
            verdict = judge_global(module, name)
            if (module, name) not in verdicts:
                verdicts[module, name] = GlobalVerdict(module, name, verdict)
                if verdict == "unsafe":
                    findings[f"names {module}.{name}"] = None
        findings.update(dict.fromkeys(program.oddities))
        for callee, args in program.calls:
            found = _judge_call(callee, args)
            if found is not None and len(findings) < MAX_FINDINGS:
                findings[found] = None
    ordered = tuple(verdicts.values())
    if findings:
        return SafetyReport("unsafe", ordered, tuple(findings))
    overall: Verdict = "unknown" if any(g.verdict != "safe" for g in ordered) else "safe"
    return SafetyReport(overall, ordered, ())
