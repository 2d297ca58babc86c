//! Errors of the library as Python exceptions: a class for each row of the table of kinds.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::{PyException, PyRuntimeError, PyTypeError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyString, PyType};
use qwen2_core::{Error, ErrorKind};

/// What a Python exception is made of; travels between threads without Python.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    key: Option<String>,
    help: Option<String>,
    /// What a function of the caller's raised: it is raised again as it is.
    raised: Option<Arc<PyErr>>,
}

impl Failure {
    /// `InvalidArgument`, worded as the library words its own: `what: key: why`.
    pub(crate) fn invalid(what: &str, key: &str, why: &str, help: &str) -> Self {
        let why = if why.is_empty() {
            String::new()
        } else {
            format!(": {why}")
        };
        Self {
            key: Some(key.to_owned()),
            ..Self::new(
                ErrorKind::InvalidArgument,
                &format!("{what}: {key}{why}"),
                help,
            )
        }
    }

    /// Of a kind, with the whole message.
    pub(crate) fn new(kind: ErrorKind, message: &str, help: &str) -> Self {
        Self {
            kind,
            message: message.to_owned(),
            path: None,
            key: None,
            help: Some(help.to_owned()),
            raised: None,
        }
    }

    fn raise(self, py: Python<'_>) -> PyResult<PyErr> {
        if let Some(raised) = self.raised {
            return Ok(raised.clone_ref(py));
        }
        let class = classes(py)?.of(py, self.kind);
        let exception = class.call1((self.message,))?;
        // `kind` is an attribute of the class.
        exception.setattr("path", self.path.map(PathBuf::into_os_string))?;
        exception.setattr("key", self.key)?;
        exception.setattr("help", self.help.as_deref())?;
        if let Some(help) = self.help
            && exception.hasattr("add_note")?
        // Python 3.11
        {
            exception.call_method1("add_note", (format!("help: {help}"),))?;
        }
        Ok(PyErr::from_value(exception))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            kind: error.kind(),
            message: error.to_string(),
            path: error.path().map(PathBuf::from),
            key: error.key().map(str::to_owned),
            help: error.help().map(str::to_owned),
            raised: raised(&error),
        }
    }
}

/// The exception at the end of the chain of causes.
fn raised(error: &Error) -> Option<Arc<PyErr>> {
    let raised = std::error::Error::source(error)?.downcast_ref::<PyErr>()?;
    Python::try_attach(|py| Arc::new(raised.clone_ref(py)))
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        Python::attach(|py| failure.raise(py).unwrap_or_else(|error| error))
    }
}

/// Why an object that belongs to this process cannot be pickled.
pub(crate) fn not_picklable(class: &str, instead: &str) -> PyErr {
    PyTypeError::new_err(format!("cannot pickle a {class}: {instead}"))
}

struct Classes {
    base: Py<PyType>,
    kinds: Vec<Py<PyType>>,
}

impl Classes {
    fn of<'py>(&self, py: Python<'py>, kind: ErrorKind) -> &Bound<'py, PyType> {
        let row = ErrorKind::ALL.iter().position(|row| *row == kind);
        row.map_or(&self.base, |row| &self.kinds[row]).bind(py)
    }
}

static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();

fn classes(py: Python<'_>) -> PyResult<&Classes> {
    CLASSES.get_or_try_init(py, || {
        let exception = py.get_type::<PyException>();
        let doc = "The base of everything that this package raises on its own account.";
        let base = new_class(py, "Qwen2Error", doc, "", (&exception,))?;
        let kinds = ErrorKind::ALL.iter().map(|kind| {
            let (name, builtin) = (kind.python_class(), kind.python_base());
            let doc = format!(
                "A Qwen2Error of the kind `{}` that is a {builtin}, too.",
                kind.name()
            );
            let builtin = py.import("builtins")?.getattr(builtin)?;
            new_class(py, name, &doc, kind.name(), (&base, builtin)).map(Bound::unbind)
        });
        let kinds = kinds.collect::<PyResult<_>>()?;
        Ok(Classes {
            base: base.unbind(),
            kinds,
        })
    })
}

/// `class name(bases)`, with the attributes of a `Qwen2Error` unset.
fn new_class<'py>(
    py: Python<'py>,
    name: &str,
    doc: &str,
    kind: &str,
    bases: impl IntoPyObject<'py>,
) -> PyResult<Bound<'py, PyType>> {
    let body = PyDict::new(py);
    body.set_item("__module__", "qwen2_rs")?;
    body.set_item("__doc__", doc)?;
    body.set_item("kind", kind)?;
    for unset in ["path", "key", "help"] {
        body.set_item(unset, py.None())?;
    }
    let class = py
        .get_type::<PyType>()
        .call1((PyString::new(py, name), bases, body))?;
    Ok(class.cast_into()?)
}

/// Puts the classes into the module.
pub(crate) fn add_classes(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let classes = classes(py)?;
    module.add("Qwen2Error", &classes.base)?;
    for (kind, class) in ErrorKind::ALL.iter().zip(&classes.kinds) {
        module.add(kind.python_class(), class)?;
    }
    Ok(())
}

/// A lock that a panic left behind does not make the object unusable: the library's own state is
/// whole after a panic, or says that it is not.
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Why an object is refused to a logits processor that it has called.
pub(crate) fn in_use(what: &str) -> Failure {
    let help = "wait until the processor has returned";
    Failure::invalid(
        "object is in use",
        what,
        "a processor uses what calls it",
        help,
    )
}

/// A thread that could not be started.
pub(crate) fn no_thread(error: &std::io::Error) -> PyErr {
    PyRuntimeError::new_err(format!("cannot start a thread: {error}"))
}
