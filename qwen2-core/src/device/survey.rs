//! Every device that there could be, and why one is not used.

use super::{BACKENDS, Device};
use crate::error::Result;

/// One row of [`Device::survey`].
#[non_exhaustive]
#[derive(Debug)]
pub struct DeviceReport {
    /// As its string says: `cpu`, `cuda`…
    pub name: &'static str,
    /// Whether this build has it.
    pub compiled: bool,
    /// `None`: it is there and computes right results; else why not, with the way out.
    pub problem: Option<crate::Error>,
}

impl Device {
    /// Tries every device that this build knows, the first of its kind each; those that are compiled
    /// in compute one small product. Takes as long as their drivers need to start.
    pub fn survey() -> Vec<DeviceReport> {
        let report = |row: &(_, &'static str, _, bool)| DeviceReport {
            name: row.1,
            compiled: row.3,
            problem: Self {
                backend: row.0,
                index: None,
            }
            .open()
            .err(),
        };
        BACKENDS.iter().map(report).collect()
    }

    /// The device that this one stands for: `auto` becomes what was found.
    ///
    /// # Errors
    /// `DeviceUnavailable` if it is not compiled in, not there, or computes wrong results.
    pub fn resolved(&self) -> Result<Self> {
        Ok(self.open()?.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_survey_has_every_device_and_a_reason_for_each_that_is_not_compiled_in() {
        let survey = Device::survey();
        assert_eq!(survey.len(), BACKENDS.len());
        for report in &survey {
            let listed = Device::compiled().contains(&report.name);
            assert_eq!(report.compiled, listed, "{}", report.name);
            if !report.compiled {
                let problem = report.problem.as_ref().expect("a reason");
                assert!(problem.to_string().ends_with("not compiled in"));
            }
        }
        let auto = Device::auto().resolved().expect("a device").to_string();
        let found = survey.iter().find(|report| report.name == auto);
        assert!(found.is_some_and(|report| report.problem.is_none()));
    }
}
