//! Who is computed next: sequences join and leave at every step, prompts are read between the tokens of
//! the others.

mod divide;
mod running;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::outlet::Outlet;
use super::prefix::{Found, PrefixCache};
use super::queue::Queue;
use super::spare::Spare;
use super::worker::{Shared, Waiting};
use super::{EngineStats, Settings};
use crate::error::{Error, ErrorKind, Result};
use crate::fence::fenced;
#[cfg(feature = "gpu")]
use crate::generate::on_device::{self, Answer};
use crate::generate::{FinishReason, Piece, Sequence, Timings};
use crate::model::{Part, Rows};
use crate::ops::{Watch, watched};
use divide::divide;
use running::Running;

/// Tokens that a sequence may have to run to count as one that decodes, not reads.
const FEW: usize = 16;
/// Tokens for which there must be room behind a prompt before it is started.
const HEADROOM: usize = 128;

/// Steps that end as planned behind one that gave way, so that long prompts go on whoever comes.
const STEADY: usize = 3;

/// Steps that are left in a row, each because somebody's request ended.
const LEFT: usize = 4;

/// Steps behind those in which each prompt is read apart: who ends theirs then takes nobody else's work with
/// it and is told without waiting for it, so that the others go on whoever comes and goes.
const APART: usize = 3;

/// What one sequence runs in a step.
#[derive(Clone, Copy)]
struct Share {
    index: usize,
    n_tokens: usize,
    /// What it gets of its batch.
    rows: Rows,
}

impl Share {
    fn new(index: usize, n_tokens: usize) -> Self {
        Self {
            index,
            n_tokens,
            rows: Rows::None,
        }
    }

    /// Rows of logits.
    fn n_rows(self) -> usize {
        match self.rows {
            Rows::All => self.n_tokens,
            Rows::Last | Rows::Screened => 1,
            _ => 0,
        }
    }
}

pub(super) struct Scheduler {
    settings: Settings,
    shared: Arc<Shared>,
    running: Vec<Running>,
    /// Those for which there was no memory, or no longer.
    held: Queue<Running>,
    prefix: PrefixCache,
    spare: Spare,
    stats: EngineStats,
    /// Steps that nothing ends before the next one may give way again.
    steady: usize,
    /// Steps that were just left in a row because a request ended.
    n_left: usize,
    /// Steps that read prompts apart.
    apart: usize,
    /// Those beside the one that such a step reads.
    beside: Arc<Beside>,
}

/// Sequences that are not computed while another is; those that end meanwhile are told from its layers.
#[derive(Default)]
struct Beside(Mutex<Vec<Running>>);

impl Beside {
    fn lock(&self) -> MutexGuard<'_, Vec<Running>> {
        // Who is told here ends; a panic leaves the others as they are.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_ended(&self) {
        for running in self.lock().iter_mut() {
            if let Some(reason) = running.sequence.interruption() {
                running.sequence.end(reason, None);
                running.tell(None);
            }
        }
    }
}

impl Scheduler {
    pub(super) fn new(settings: Settings, shared: Arc<Shared>) -> Self {
        Self {
            settings,
            shared,
            running: Vec::new(),
            held: Queue::default(),
            prefix: PrefixCache::new(),
            spare: Spare::default(),
            stats: EngineStats::default(),
            steady: 0,
            n_left: 0,
            apart: 0,
            beside: Arc::default(),
        }
    }

    /// Computes until the engine is dropped.
    pub(super) fn run(&mut self) {
        while !self.shared.stops() {
            self.reap();
            self.admit();
            let plan = self.plan();
            self.report();
            if plan.is_empty() {
                let nap = !self.running.is_empty() || self.held.len() > 0;
                if !self.shared.wait(nap) {
                    break;
                }
                continue;
            }
            self.step(plan);
        }
    }

    fn report(&mut self) {
        let mut inbox = self.shared.lock();
        self.stats.finished += std::mem::take(&mut inbox.n_withdrawn);
        let (submitted, cache_limit) = (inbox.stats.submitted, inbox.stats.cache_limit);
        inbox.stats = EngineStats {
            running: self.running.len(),
            waiting: self.held.len(),
            cache_bytes: self.used(),
            submitted,
            cache_limit,
            ..self.stats
        };
    }

    /// Ends what nobody waits for, or no longer.
    fn reap(&mut self) {
        let is_over = |sequence: &Sequence, outlet: &Outlet| {
            let unread = outlet.full_since();
            sequence.interruption().is_some()
                || outlet.is_dropped()
                || unread.is_some_and(|since| since.elapsed() > self.settings.reader_patience)
        };
        withdraw(&self.shared);
        let over = self
            .running
            .extract_if(.., |running| is_over(&running.sequence, &running.outlet));
        let mut over: Vec<_> = over.collect();
        over.extend(self.held.take(|one| is_over(&one.sequence, &one.outlet)));
        for mut running in over {
            let reason = running.sequence.interruption();
            let reason = reason.unwrap_or(FinishReason::Cancelled);
            running.sequence.end(reason, None);
            self.end(running, None);
        }
    }

    /// Starts what waits, as far as there is room.
    fn admit(&mut self) {
        while self.running.len() < self.settings.max_sequences {
            let Some(mut next) = self.next() else { break };
            let found = self.find(&mut next);
            let need = self.need(&next);
            if need > self.settings.cache_bytes {
                self.end(next, Some(too_large(need, self.settings.cache_bytes)));
            } else if self.make_room(need) || self.running.is_empty() {
                self.begin(next, found);
            } else {
                // What runs will end and leave its memory.
                self.unpin(&mut next);
                self.held.push(next.place, next);
                break;
            }
        }
    }

    /// The first of those that wait.
    fn next(&mut self) -> Option<Running> {
        let held = self.held.first().map(|(place, _)| place);
        let mut inbox = self.shared.lock();
        let waiting = inbox.queue.first().map(|(place, _)| place);
        if held.is_some_and(|held| waiting.is_none_or(|waiting| held < waiting)) {
            return self.held.pop().map(|(_, running)| running);
        }
        let (place, waiting) = inbox.queue.pop()?;
        drop(inbox);
        self.shared.tell_room();
        Some(Running::new(waiting, place))
    }

    /// Readies its cache; what it begins with that others have computed, pinned.
    fn find(&mut self, running: &mut Running) -> Option<Found> {
        let tokens = running.sequence.tokens();
        running
            .network
            .qwen2
            .ready(&mut running.cache, tokens.len());
        let shares = self.settings.prefix_cache && !running.sequence.reads_prompt();
        if !shares || running.cache.is_long() {
            return None;
        }
        let mut found = self
            .prefix
            .find(&running.network, tokens, &running.cache, 1);
        if self.settings.deterministic {
            // What comes behind is read in the same chunks as if nothing was shared.
            found.n_tokens -= found.n_tokens % self.settings.prefill_chunk;
        }
        running.n_pinned = found.n_pinned;
        Some(found)
    }

    /// Bytes that must be there for a sequence to start, beside the pages that it has pinned.
    fn need(&self, running: &Running) -> u64 {
        let n = running.sequence.tokens().len();
        let rest = running.sequence.most_tokens() - n;
        let rest = match self.settings.deterministic {
            true => rest, // it is never preempted
            false => rest.min(HEADROOM),
        };
        let cache = &running.cache;
        cache.bytes_for(n + rest) - cache.bytes_of_pages(running.n_pinned)
    }

    fn begin(&mut self, mut running: Running, found: Option<Found>) {
        let found = found.filter(|found| found.n_tokens > 0);
        self.spare.give(&running.network, &mut running.cache);
        let cached = found.map_or(0, |found| running.adopt(found));
        if running.first.is_none() {
            running.started = Instant::now();
            running.sequence.set_cached(cached);
            self.stats.cached_tokens += cached as u64;
        }
        self.running.push(running);
    }

    /// Bytes of all caches, what they share counted once.
    fn used(&self) -> u64 {
        let own = self.running.iter().map(Running::own_bytes);
        self.prefix.bytes() + self.spare.bytes() + own.sum::<u64>()
    }

    /// Whether there is room for `bytes` more, for which shared prefixes may be forgotten.
    fn make_room(&mut self, bytes: u64) -> bool {
        while self.used() + bytes > self.settings.cache_bytes {
            if !self.spare.forget() && !self.prefix.evict() {
                return false;
            }
        }
        true
    }

    /// What each sequence runs next: those that decode all they have, prompts as much as a step reads.
    fn plan(&mut self) -> Vec<Share> {
        let (mut plan, mut prompts) = (Vec::new(), Vec::new());
        for (index, running) in self.running.iter().enumerate() {
            let n_tokens = running.pending();
            if !running.outlet.has_room() {
                continue;
            }
            match n_tokens <= FEW {
                true => plan.push(Share::new(index, n_tokens)),
                false => prompts.push(Share::new(index, n_tokens)),
            }
        }
        let chunk = self.settings.prefill_chunk;
        let begins = |share: &Share| self.running[share.index].first.is_none();
        let begins = plan.iter().any(begins);
        if self.settings.deterministic {
            // Always to the next multiple, whoever else is there.
            plan.extend(prompts.into_iter().map(|share| {
                let done = self.running[share.index].cache.n_tokens();
                let n_tokens = share.n_tokens.min(chunk - done % chunk);
                Share { n_tokens, ..share }
            }));
        } else {
            let place = |share: &Share| self.running[share.index].place;
            plan.extend(divide(prompts, chunk, begins, place));
        }
        plan.sort_by_key(|share| self.running[share.index].place);
        self.fit(plan)
    }

    /// Leaves out what has no memory to grow, the last first.
    fn fit(&mut self, mut plan: Vec<Share>) -> Vec<Share> {
        let mut growth = self.growth(&plan);
        while growth > 0 && !self.make_room(growth) {
            let Some(last) = plan.pop() else { break };
            if plan.is_empty() && self.running.len() == 1 {
                // Alone, and the memory does not do.
                let running = self.running.swap_remove(last.index);
                let need = running.cache.bytes_for(running.sequence.tokens().len());
                self.end(running, Some(too_large(need, self.settings.cache_bytes)));
                break;
            }
            let gone = self.running.len() - 1;
            self.preempt(last.index);
            for share in &mut plan {
                if share.index == gone {
                    share.index = last.index; // it took the place of the one that went
                }
            }
            growth = self.growth(&plan);
        }
        plan
    }

    fn growth(&self, plan: &[Share]) -> u64 {
        let of = |share: &Share| {
            let cache = &self.running[share.index].cache;
            cache.bytes_for(cache.n_tokens() + share.n_tokens) - cache.bytes()
        };
        plan.iter().map(of).sum()
    }

    /// Gives up the cache of a sequence; it is computed again when there is room.
    fn preempt(&mut self, index: usize) {
        let mut running = self.running.swap_remove(index);
        self.unpin(&mut running);
        running.cache.clear();
        running.shared = false;
        self.stats.preempted += 1;
        self.held.push(running.place, running);
    }

    fn unpin(&mut self, running: &mut Running) {
        let tokens = running.sequence.tokens();
        self.prefix
            .unpin(&running.network, tokens, running.n_pinned);
        running.n_pinned = 0;
    }

    fn step(&mut self, plan: Vec<Share>) {
        let mut ended = Vec::new();
        let mut left = false;
        for mut batch in self.batches(plan) {
            self.stats.steps += 1;
            // In the order of `running`, in which logits are taken.
            batch.sort_by_key(|share| share.index);
            let single = batch.len() == 1;
            for share in &mut batch {
                share.rows = self.running[share.index].rows(share.n_tokens, single);
            }
            #[cfg(feature = "gpu")]
            if single && self.on_device(batch[0], &mut ended) {
                continue;
            }
            let watch = self.watch(&batch);
            match self.forward(&batch, &watch) {
                Some(Ok(logits)) => self.take_logits(&batch, logits, &mut ended),
                Some(Err(error)) => self.take_failure(&batch, error, &mut ended),
                // It took nobody's work with it.
                None if single && self.has_ended(batch[0]) => {}
                None => {
                    left = true; // what is urgent comes first
                    break;
                }
            }
        }
        if !left {
            self.apart = self.apart.saturating_sub(1);
            self.n_left = 0;
        }
        // From the end on, so that the others keep their places.
        ended.sort_by_key(|(index, _)| std::cmp::Reverse(*index));
        for (index, error) in ended {
            let running = self.running.swap_remove(index);
            self.end(running, error);
        }
    }

    /// The shares that are computed together: of one network, and one by one where that could change
    /// what comes out.
    fn batches(&self, plan: Vec<Share>) -> Vec<Vec<Share>> {
        let mut batches: Vec<Vec<Share>> = Vec::new();
        for share in plan {
            let running = &self.running[share.index];
            let fits = |batch: &&mut Vec<Share>| {
                let first = &self.running[batch[0].index];
                Arc::ptr_eq(&first.network, &running.network) && !first.alone
            };
            let apart = self.apart > 0 && share.n_tokens > FEW;
            let single = running.alone || self.settings.deterministic || apart;
            match batches.iter_mut().find(fits).filter(|_| !single) {
                Some(batch) => batch.push(share),
                None => batches.push(vec![share]),
            }
        }
        batches
    }

    /// The logits of a batch; `None` where it was left, and then nothing has changed.
    fn forward(&mut self, batch: &[Share], watch: &Watch) -> Option<Result<Vec<f32>>> {
        let logits = match batch {
            [share] if self.apart > 0 => {
                self.running.swap(0, share.index);
                *self.beside.lock() = self.running.split_off(1);
                let logits = self.compute(&[Share { index: 0, ..*share }], watch);
                self.running.append(&mut self.beside.lock());
                self.running.swap(0, share.index);
                logits
            }
            _ => self.compute(batch, watch),
        };
        if !watch.is_over() {
            self.steady = self.steady.saturating_sub(1);
            return Some(logits);
        }
        if logits.is_err() {
            // No failure of theirs, perhaps one of operations that were left out; their caches are empty.
            batch.iter().for_each(|share| self.forget(share.index));
        }
        if !(0..self.running.len()).any(|index| self.has_ended(Share::new(index, 0))) {
            self.steady = STEADY;
        } else if self.apart == 0 {
            self.n_left += 1;
            if self.n_left == LEFT {
                (self.n_left, self.apart) = (0, APART);
            }
        }
        None
    }

    /// The logits of a batch; its caches are as before where it was left.
    fn compute(&mut self, batch: &[Share], watch: &Watch) -> Result<Vec<f32>> {
        let network = self.running[batch[0].index].network.clone();
        let mut shares = batch.iter().peekable();
        let parts = self.running.iter_mut().enumerate();
        let mut parts: Vec<Part<'_>> = parts
            .filter_map(|(index, running)| {
                let share = shares.next_if(|share| share.index == index)?;
                Some(running.part(*share))
            })
            .collect();
        let n_past: Vec<usize> = parts.iter().map(|part| part.cache.n_tokens()).collect();
        let logits = watched(watch, || network.forward_batch(&mut parts));
        if watch.is_over() {
            // The tokens may be in the caches already: it ended behind the last layer.
            for (part, n_past) in parts.iter_mut().zip(n_past) {
                part.cache.truncate(n_past);
            }
        }
        logits
    }

    fn has_ended(&self, share: Share) -> bool {
        let sequence = &self.running[share.index].sequence;
        sequence.interruption().is_some()
    }

    /// What ends a step: that a request of the engine's ends, which is to hear so at once, and while prompts
    /// are read a short one that waits, which need not wait for all of them. Behind a step that was left for
    /// the sake of another, one ends as planned.
    fn watch(&self, batch: &[Share]) -> Watch {
        let ends = match batch {
            _ if self.apart == 0 => {
                Watch::first_of(self.running.iter().map(|one| one.sequence.watch()))
            }
            [share] => self.running[share.index].sequence.watch(),
            _ => Watch::default(),
        };
        if batch.iter().all(|share| share.n_tokens <= FEW) {
            return ends;
        }
        let may_give_way = self.steady == 0 && self.running.len() < self.settings.max_sequences;
        let short = self.settings.prefill_chunk / 2;
        let (shared, beside) = (self.shared.clone(), self.beside.clone());
        let switch = Arc::<AtomicBool>::default();
        let gives_way = switch.clone();
        let on_layer = move |_, _| {
            withdraw(&shared);
            beside.tell_ended();
            let inbox = shared.lock();
            let is_short = |waiting: &Waiting| waiting.job.sequence.tokens().len() <= short;
            let waits = || {
                let first = inbox.queue.first();
                first.is_some_and(|(_, first)| is_short(first))
            };
            if inbox.stops() || may_give_way && waits() {
                gives_way.store(true, Ordering::Release);
            }
        };
        Watch {
            on_layer: Some(Arc::new(on_layer)),
            ..Watch::first_of([ends, Watch::of(switch)])
        }
    }

    fn take_logits(
        &mut self,
        batch: &[Share],
        mut logits: Vec<f32>,
        ended: &mut Vec<(usize, Option<Error>)>,
    ) {
        let n_rows: usize = batch.iter().map(|share| share.n_rows()).sum();
        let width = logits.len().checked_div(n_rows).unwrap_or(0);
        let mut rest = &mut logits[..];
        for share in batch {
            let index = share.index;
            let running = &mut self.running[index];
            let rows;
            (rows, rest) = rest.split_at_mut(share.n_rows() * width);
            if running.first.is_none() {
                self.stats.prompt_tokens += share.n_tokens as u64;
            }
            if share.rows == Rows::All {
                running.sequence.read_prompt(rows, width);
            }
            if running.pending() > 0 {
                continue;
            }
            let last = rows.len() - width;
            let row = &mut rows[last..];
            self.take_token(index, |sequence| sequence.accept(row), ended);
        }
    }

    /// Goes on behind the token that `choose` gives.
    fn take_token(
        &mut self,
        index: usize,
        choose: impl FnOnce(&mut Sequence) -> Result<Piece>,
        ended: &mut Vec<(usize, Option<Error>)>,
    ) {
        let running = &mut self.running[index];
        if self.settings.prefix_cache && !running.shared && !running.cache.is_long() {
            running.share(&mut self.prefix, true);
        }
        // A logits processor is the caller's: its panic ends its own request.
        let chosen = fenced(|| choose(&mut running.sequence));
        let chosen = chosen.unwrap_or_else(|why| Err(panicked(why)));
        match running.take(chosen) {
            Ok(n_tokens) => self.stats.completion_tokens += n_tokens,
            Err(error) => {
                ended.push((index, Some(error)));
                return;
            }
        }
        running.first.get_or_insert_with(Instant::now);
        if running.sequence.is_finished() {
            ended.push((index, None));
        }
    }

    /// Whether the step of a sequence alone was one of a device that finds the next token itself.
    #[cfg(feature = "gpu")]
    fn on_device(&mut self, share: Share, ended: &mut Vec<(usize, Option<Error>)>) -> bool {
        let running = &mut self.running[share.index];
        if running.first.is_none() || running.sequence.interruption().is_some() {
            return false;
        }
        let network = running.network.clone();
        match on_device::next(&network, &mut running.sequence, &mut running.cache) {
            Ok(Answer::None) => return false,
            Ok(Answer::Token(token)) => {
                self.take_token(share.index, |sequence| sequence.push(token), ended);
            }
            Ok(Answer::Logits(logits)) => self.take_logits(&[share], logits, ended),
            Err(error) => self.take_failure(&[share], error, ended),
        }
        self.steady = self.steady.saturating_sub(1);
        true
    }

    /// Tries the sequences of a batch that failed one by one, from their tokens on; one that fails alone
    /// ends.
    fn take_failure(
        &mut self,
        batch: &[Share],
        error: Error,
        ended: &mut Vec<(usize, Option<Error>)>,
    ) {
        if let [share] = batch {
            ended.push((share.index, Some(error)));
            return;
        }
        tracing::warn!(%error, sequences = batch.len(), "batch failed, its sequences go on one by one");
        for share in batch {
            self.forget(share.index);
            self.running[share.index].alone = true;
        }
    }

    /// Drops what was computed for a sequence, which begins again.
    fn forget(&mut self, index: usize) {
        let mut running = self.running.swap_remove(index);
        self.unpin(&mut running);
        running.cache.clear();
        running.shared = false;
        // Back to its place, where the indices of the others point to.
        let last = self.running.len();
        self.running.push(running);
        self.running.swap(index, last);
    }

    /// Hands the result to the reader.
    fn end(&mut self, mut running: Running, error: Option<Error>) {
        let is_kept = self.settings.prefix_cache && !running.cache.is_long() && error.is_none();
        if is_kept && running.cache.n_tokens() > 0 {
            running.share(&mut self.prefix, false);
        }
        self.unpin(&mut running);
        self.stats.finished += 1;
        self.stats.failed += u64::from(error.is_some());
        // A step that is replayed adds up in another order than one that is launched.
        if error.is_none() && !self.settings.deterministic {
            self.spare.keep(&running.network, &mut running.cache);
        }
        self.make_room(0);
        self.report();
        running.tell(error);
    }
}

/// Ends what waits in vain: its reader is gone, cancelled it or has no more time.
fn withdraw(shared: &Shared) {
    let is_over = |waiting: &Waiting| {
        waiting.job.sequence.interruption().is_some() || waiting.outlet.is_dropped()
    };
    let withdrawn = shared.lock().queue.take(is_over);
    if withdrawn.is_empty() {
        return;
    }
    shared.lock().n_withdrawn += withdrawn.len() as u64;
    shared.tell_room();
    for Waiting { job, outlet } in withdrawn {
        let mut sequence = job.sequence;
        let reason = sequence.interruption();
        sequence.end(reason.unwrap_or(FinishReason::Cancelled), None);
        outlet.end(Ok(sequence.take_generation(Timings::default())));
    }
}

fn panicked(why: String) -> Error {
    Error::new(ErrorKind::Internal, "request failed between two steps")
        .with_why(why)
        .with_help("does its logits processor panic?")
}

fn too_large(need: u64, have: u64) -> Error {
    Error::new(
        ErrorKind::OutOfMemory,
        "request does not fit the engine's memory",
    )
    .with_key("cache_bytes")
    .with_why(format!("it needs {need} bytes, the engine has {have}"))
    .with_help("shorten the prompt, lower max_new_tokens, or give the engine more memory")
}

#[cfg(test)]
mod leaving;
