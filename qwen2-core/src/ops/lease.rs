//! What a model takes of a device goes back to the system with it.

use std::sync::Arc;

use burn::tensor::Device;

use crate::fence::fenced;

/// Held by all that has buffers of a model's: when the last holder is gone, the device gives its free memory back to
/// the system, which otherwise stays with the process for the next model.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    #[allow(dead_code)] // as above
    held: Arc<Held>,
}

#[derive(Debug)]
struct Held(Device);

impl Lease {
    pub(crate) fn of(device: &Device) -> Self {
        Self {
            held: Arc::new(Held(device.clone())),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Err(why) = fenced(|| self.0.memory_cleanup()) {
            tracing::debug!(why, "memory was not given back");
        }
    }
}
