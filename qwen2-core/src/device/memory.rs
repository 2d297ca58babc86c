//! What a model may take of a device's memory.

use super::Device;
use crate::error::{Error, ErrorKind, Result};

impl Device {
    /// Bytes that are free on the device; `None` where nobody tells: the processor's memory is the
    /// system's, and wgpu has no call for it.
    fn free_memory(&self) -> Option<u64> {
        #[cfg(feature = "cuda")]
        if self.is_cuda() {
            let context = cudarc::driver::CudaContext::new(self.index.unwrap_or(0)).ok()?;
            return context.mem_get_info().ok().map(|(free, _)| free as u64);
        }
        None
    }

    /// Refuses weights that the device has no room for, before any is read.
    ///
    /// # Errors
    /// `OutOfMemory` with both sizes.
    pub(crate) fn check_room(&self, weights: u64) -> Result<()> {
        match self.free_memory() {
            Some(free) if free < weights => Err(self.would_not_fit(weights, free)),
            _ => Ok(()),
        }
    }

    fn would_not_fit(&self, need: u64, have: u64) -> Error {
        let gib = |bytes: u64| bytes as f64 / (1 << 30) as f64;
        Error::new(
            ErrorKind::OutOfMemory,
            "model does not fit into the device's memory",
        )
        .with_key(self.to_string())
        .with_why(format!(
            "its weights take {:.1} GiB, {:.1} GiB are free",
            gib(need),
            gib(have)
        ))
        .with_help(
            "pack it (`quantize`: q8, q4), free the device's memory, or take a smaller model",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_does_not_fit_is_refused_with_both_sizes() {
        let device: Device = "cuda:1".parse().expect("a device");
        let error = device.would_not_fit(3 << 30, 1 << 29);
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        let text = error.to_string();
        assert!(
            text.contains("cuda:1") && text.contains("3.0 GiB") && text.contains("0.5 GiB"),
            "{text}"
        );
        assert!(Device::cpu().check_room(u64::MAX).is_ok());
    }
}
