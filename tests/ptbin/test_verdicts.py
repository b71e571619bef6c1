"""Safe, unknown, unsafe: by name and by construction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest

from ptbin import ConvertOptions, convert, inspect
from ptbin.errors import PtbinError
from ptbin.reading.pickle.interpreter import run_pickle
from ptbin.reading.pickle.judged_names import judge_global
from ptbin.reading.pickle.verdicts import judge_programs
from tests.checkpoints import Factory, MadeOnce, factories
from tests.checkpoints.craft import named, text

SAFE = """
collections.OrderedDict torch._utils._rebuild_tensor_v2 torch.FloatStorage torch.float8_e4m3fn
torch.Size numpy.core.multiarray._reconstruct numpy._core.multiarray.scalar numpy.dtype
_codecs.encode __builtin__.set builtins.complex argparse.Namespace pathlib.PosixPath
torch.nn.modules.linear.Linear torch.nn.modules.batchnorm.BatchNorm2d torch.optim.adam.Adam
torch.storage._load_from_bytes __torch__.models.net.Net
torch.nn.backends.thnn._get_thnn_function_backend
""".split()

UNKNOWN = """
mymodel.Net models.yolo.Model omegaconf.dictconfig.DictConfig functools.partial
transformers.training_args.OptimizerNames trl.trainer.sft_config.SFTConfig
dill._dill._create_function cloudpickle.cloudpickle._make_function enum.Enum
torch_geometric.data.data.Data builtins.getattr _io.BytesIO
lightning.fabric.utilities.data.AttributeDict
""".split()

UNSAFE = """
os.system posix.system nt.system subprocess.Popen commands.getoutput builtins.eval __builtin__.exec
builtins.compile builtins.__import__ builtins.open __builtin__.apply sys.modules socket.socket
pip.main pip._internal.main pydoc.locate ctypes.CDLL runpy.run_path importlib.import_module
code.interact pty.spawn webbrowser.open shutil.rmtree logging.config.listen logging.FileHandler
operator.attrgetter operator.methodcaller _operator.attrgetter types.CodeType marshal.loads
pickle.loads _pickle.loads torch.hub.load torch.load torch.serialization.load
torch.utils.cpp_extension.load torch.distributed.rpc.rpc_sync numpy.testing._private.utils.runstring
numpy.f2py.crackfortran.getlincoef asyncio.unix_events._UnixSubprocessTransport._start profile.run
cProfile.run timeit.timeit trace.Trace bdb.Bdb.run pdb.run doctest.debug_script
idlelib.run.Executive lib2to3.pgen2.grammar ensurepip._run_pip venv.create uuid._get_command_stdout
_aix_support._read_cmd_output _osx_support._find_build_tool torch.nn.os.system
mypackage.thing.os.system dill.loads cloudpickle.loads joblib.load pandas.read_pickle requests.get
urllib.request.urlopen http.client.HTTPSConnection ftplib.FTP smtplib.SMTP tempfile.mkstemp
""".split()


def split(path: str) -> tuple[str, str]:
    module, _, name = path.rpartition(".")
    return module, name


@pytest.mark.parametrize("path", SAFE)
def test_known_good_names_are_safe(path: str) -> None:
    assert judge_global(*split(path)) == "safe"


@pytest.mark.parametrize("path", UNKNOWN)
def test_a_models_own_classes_are_unknown(path: str) -> None:
    assert judge_global(*split(path)) == "unknown"


@pytest.mark.parametrize("path", UNSAFE)
def test_names_that_reach_the_system_are_unsafe(path: str) -> None:
    assert judge_global(*split(path)) == "unsafe"


@pytest.mark.parametrize("name", ["os.system", "Module.__class__", "a.__globals__", "F.os.popen"])
def test_every_step_of_a_dotted_name_counts(name: str) -> None:
    assert judge_global("torch.nn", name) == "unsafe"


def verdict(stream: bytes) -> str:
    return judge_programs([run_pickle(stream, reducers={})]).verdict


def test_getattr_is_judged_by_what_it_asks_for() -> None:
    bound_method = b"\x80\x02cbuiltins\ngetattr\ncmymodel\nNet\nX\x07\x00\x00\x00forward\x86R."
    private = b"\x80\x02cbuiltins\ngetattr\ncmymodel\nNet\nX\x08\x00\x00\x00__dict__\x86R."
    assert verdict(bound_method) == "unknown"
    assert verdict(private) == "unsafe"


def getattr_of(target: bytes, *steps: str) -> bytes:
    for step in steps:
        target = named("builtins", "getattr") + target + text(step) + b"\x86R"
    return target


def path_of(dotted: str) -> bytes:
    """`module:Name.attribute.attribute` by GLOBAL and getattr."""
    module, _, steps = dotted.partition(":")
    first, *rest = steps.split(".")
    return getattr_of(named(module, first), *rest)


HARMLESS_ATTRIBUTES = """
mymodel:Net.Config mymodel:Net.Config.Mode __main__:GPT.Act.GELU mymodel:Net._init_weights
mymodel:Net.compile mymodel:Net.open mymodel:Net.select mymodel:Net.trace mymodel:Scheme.http
mymodel:Config.from_dict torch.nn.modules.linear:Linear.forward models.yolo:Model.profile
mymodel:net.forward mymodel:_Private.Inner.http
""".split()

HIDDEN_ATTRIBUTES = """
random:_os.mknod logging:os.execl mymodel:subprocess.Popen mymodel:subprocess.run mymodel:Net.os.system
mymodel:Net.os.execl mymodel:Net.subprocess.Popen mymodel:Net.__init__ mymodel:Net.__class__
mymodel:Net.forward.__globals__ mymodel:Net.forward.func_globals mymodel:generator.gi_frame.f_builtins
mymodel:builtins.eval mymodel:module.exec mymodel:io.open builtins:type.mro builtins:object.Thing
torch:utils.cpp_extension torch:hub.load torch.nn:os.execv torch:serialization.os.execl mymodel:sys.modules
mymodel:logging.FileHandler mymodel:importlib.import_module mymodel:pickle.loads mymodel:_pickle.loads
__builtin__:eval.Thing os:path.Thing mymodel:Net.system mymodel:Net.popen mymodel:ctypes.CDLL numpy:load.x
""".split()


@pytest.mark.parametrize("path", HARMLESS_ATTRIBUTES)
@pytest.mark.parametrize("end", [b"", b")R", b")\x81", b")}\x92"], ids=["held", "called", "new", "new_ex"])
def test_what_lies_in_a_models_own_class_is_unknown(path: str, end: bytes) -> None:
    if path == "torch.nn.modules.linear:Linear.forward" and end:
        pytest.skip("a method of torch's own class: held by bound methods, called by none")
    assert verdict(b"\x80\x02" + path_of(path) + end + b".") == "unknown"


@pytest.mark.parametrize("path", HIDDEN_ATTRIBUTES)
@pytest.mark.parametrize("end", [b"", b")R"], ids=["held", "called"])
def test_what_getattr_reaches_is_judged_by_every_step(path: str, end: bytes) -> None:
    assert verdict(b"\x80\x02" + path_of(path) + end + b".") == "unsafe"


@pytest.mark.parametrize(
    "call",
    [
        path_of("pathlib:Path.write_text") + b")R",
        path_of("numpy:ndarray.tofile") + b")R",
        path_of("collections:OrderedDict.fromkeys") + b")R",
        named("pathlib", "Path.write_text") + b")R",
        path_of("torch.nn.modules.linear:Linear.forward") + b")R",
        # what a call or a value gave, however it is reached
        getattr_of(named("mymodel", "make") + b")R", "method") + b")R",
        getattr_of(text("{}"), "format") + b")R",
        getattr_of(getattr_of(named("mymodel", "make") + b")R", "inner"), "run") + b")R",
        path_of("mymodel:Net.Config") + b")R)R",
        b"(" + path_of("mymodel:Net.Config") + b"o)R",
        # a special method is held by some, called by none; nothing leads through one
        path_of("mymodel:registry.__getitem__") + text("os") + b"\x85R",
        path_of("mymodel:Net.__call__") + b")R",
        path_of("mymodel:registry.__getitem__.__self__"),
        path_of("mymodel:registry.__getitem__.Inner"),
        # more than a pickler writes
        path_of("mymodel:Net" + ".a" * 40),
        named("builtins", "getattr") + named("mymodel", "Net") + text("a.b") + b"\x86R",
        named("builtins", "getattr") + named("mymodel", "Net") + named("mymodel", "name") + b"\x86R",
        named("builtins", "getattr") + named("random", "_os") + text("mknod") + b"N\x87R)R",
        # a change to a class or module that the pickle did not make
        path_of("mymodel:Net.Config") + b"}" + text("forward") + named("mymodel", "f") + b"sb",
        path_of("mymodel:Net.registry") + text("key") + text("value") + b"s",
        path_of("mymodel:Net.registry") + b"(" + text("key") + text("value") + b"u",
        path_of("mymodel:Net.hooks") + named("mymodel", "f") + b"a",
        path_of("mymodel:Net.hooks") + b"(" + named("mymodel", "f") + b"e",
        path_of("mymodel:Net.hooks") + b"(" + named("mymodel", "f") + b"\x90",
        named("mymodel", "Net") + b"}b",
        # by copyreg instead of an opcode
        named("copyreg", "__newobj__") + path_of("random:_os.mknod") + text("x") + b"\x86R",
        named("copyreg", "_reconstructor")
        + named("mymodel", "make")
        + b")R"
        + named("builtins", "object")
        + b"N\x87R",
    ],
)
def test_what_hides_behind_getattr_is_unsafe(call: bytes) -> None:
    assert verdict(b"\x80\x02" + call + b".") == "unsafe"


def test_a_long_chain_of_getattr_calls_is_judged_in_linear_time() -> None:
    chain = getattr_of(named("mymodel", "Net"), *["a"] * 20_000)
    assert verdict(b"\x80\x02" + chain + b".") == "unsafe"


def test_calling_a_value_hides_the_name_that_is_called() -> None:
    assert verdict(b"\x80\x02cmymodel\nfactory\n)R)R.") == "unsafe"


@pytest.mark.parametrize("factory", factories(), ids=str)
def test_inspect_and_convert_agree_on_the_verdict(
    factory: Factory, made_once: MadeOnce, tmp_path: Path
) -> None:
    made = made_once(factory)
    inspected = _outcome(lambda: inspect(str(made.path))["verdict"])
    converted = _outcome(
        lambda: convert(str(made.path), str(tmp_path / "out.bin"), ConvertOptions(**made.options))["safety"][
            "verdict"
        ]
    )
    if inspected in ("safe", "unknown"):
        # what is inside may be refused all the same, for another reason
        assert converted == inspected or converted not in ("safe", "unknown", "unsafe", "unsafe_pickle")
    else:
        assert converted == ("unsafe_pickle" if inspected == "unsafe" else inspected)


def _outcome(call: Callable[[], str]) -> str:
    """A verdict, or the reason why there is none."""
    try:
        return call()
    except PtbinError as error:
        return error.reason


SCRIPT = """
class OfAScript:
    def __init__(self, value):
        self.value = value

    def doubled(self):
        return self.value * 2
"""


def of_a_script() -> object:
    """An instance of a class that no module can be asked for, as those of notebooks."""
    names: dict[str, type] = {"__name__": "__main__"}  # type: ignore[dict-item]
    exec(SCRIPT, names)  # noqa: S102 - our own text
    return names["OfAScript"](3)


class CallsAFunction:
    def __reduce__(self) -> tuple[object, ...]:
        return (lambda: "run", ())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_class_that_cloudpickle_wrote_out_is_unknown(protocol: int) -> None:
    stream = cloudpickle.dumps(of_a_script(), protocol=protocol)
    assert b"_make_skeleton_class" in stream, "by value"
    report = judge_programs([run_pickle(stream, reducers={})])
    assert (report.verdict, report.findings) == ("unknown", ())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_function_that_the_pickle_itself_calls_is_unsafe(protocol: int) -> None:
    assert verdict(cloudpickle.dumps(CallsAFunction(), protocol=protocol)) == "unsafe"


def test_an_extension_code_hides_its_name() -> None:
    assert verdict(b"\x80\x02\x82\x01.") == "unsafe"


def test_nothing_named_nothing_to_fear() -> None:
    assert verdict(b"\x80\x02}.") == "safe"
