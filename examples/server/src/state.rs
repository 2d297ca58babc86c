//! What all requests share.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use qwen2_core::Model;
use tokio::sync::watch;

use crate::backend::Backend;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::settings::Settings;

/// A handle to the server's state, cheap to clone.
#[derive(Clone)]
pub(crate) struct App(Arc<Shared>);

/// Resolves when the server ends.
pub(crate) type Ending = Pin<Box<dyn Future<Output = ()> + Send>>;

pub(crate) struct Shared {
    pub(crate) settings: Settings,
    /// What clients call the model.
    pub(crate) name: String,
    /// When the server started, in seconds since 1970: OpenAI's `created` of a model.
    pub(crate) created: u64,
    pub(crate) backend: Backend,
    pub(crate) metrics: Metrics,
    end: watch::Sender<bool>,
}

impl App {
    /// # Errors
    /// If the engine does not start, or two metrics had the same name.
    pub(crate) fn new(model: &Model, settings: Settings) -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            name: settings
                .name
                .clone()
                .unwrap_or_else(|| model.name().to_owned()),
            created: now(),
            backend: Backend::new(model, &settings).map_err(io::Error::other)?,
            metrics: Metrics::new().map_err(io::Error::other)?,
            settings,
            end: watch::Sender::new(false),
        })))
    }

    /// Tells every answer to stop.
    pub(crate) fn end(&self) {
        self.0.end.send_replace(true);
    }

    /// Resolves once [`Self::end`] was called.
    pub(crate) fn ending(&self) -> Ending {
        let mut end = self.0.end.subscribe();
        Box::pin(async move {
            let _ = end.wait_for(|&end| end).await;
        })
    }

    /// # Errors
    /// 404 if `model` is another one.
    pub(crate) fn check_name(&self, model: Option<&str>) -> Result<(), ApiError> {
        match model {
            Some(model) if model != self.name => Err(ApiError::no_such_model(model, &self.name)),
            _ => Ok(()),
        }
    }
}

impl std::ops::Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}
