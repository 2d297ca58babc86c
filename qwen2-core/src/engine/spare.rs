//! The buffers of a sequence that ended, where they are no pages: the next one goes on in them, on a GPU
//! with the step that was recorded over them.

use std::sync::Arc;

use crate::generate::Network;
use crate::model::cache::Cache;

#[derive(Default)]
pub(super) struct Spare(Option<(Arc<Network>, Cache)>);

impl Spare {
    /// Keeps the buffers of a cache, in place of those that were kept.
    pub(super) fn keep(&mut self, network: &Arc<Network>, cache: &mut Cache) {
        if !cache.shares_pages() && cache.bytes() > 0 {
            self.0 = Some((network.clone(), cache.leave()));
        }
    }

    /// Gives what it kept to an empty cache, if it is of this network.
    pub(super) fn give(&mut self, network: &Arc<Network>, cache: &mut Cache) {
        let is_its = |(of, _): &mut (Arc<Network>, Cache)| Arc::ptr_eq(of, network);
        if cache.bytes() == 0
            && let Some((_, kept)) = self.0.take_if(is_its)
        {
            cache.go_on_in(kept);
        }
    }

    /// Lets go of it; whether there was something.
    pub(super) fn forget(&mut self) -> bool {
        self.0.take().is_some()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.as_ref().map_or(0, |(_, cache)| cache.bytes())
    }
}
