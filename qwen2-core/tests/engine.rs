//! What an engine promises: every request gets what it would get alone, whoever joins and leaves.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::task::{Context, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use common::{demo, fixture, load, root, unrounded};
use qwen2_core::{
    Engine, Error, ErrorKind, FinishReason, GenerateOptions, LogitsProcessor, Message, Model,
    Prompt, Request, RequestStream, WhenFull,
};

fn greedy(n: usize) -> GenerateOptions {
    let mut options = GenerateOptions::greedy().max_new_tokens(n);
    options.ignore_eos = true;
    options
}

fn questions() -> Vec<Prompt> {
    let ask = |i: usize| match i % 3 {
        0 => format!("What is {} plus {}?", i, 2 * i + 1),
        1 => format!("Count from {} to {}.", i, i + 9),
        _ => format!("Which is larger, {} or {}?", 3 * i, 40 - i),
    };
    let asked = (1..=24).map(|i| Prompt::Chat(vec![Message::user(ask(i))]));
    asked.collect()
}

/// Tokens of a sequence that a fixture's vocabulary has, different for each seed.
fn tokens(n: usize, seed: usize) -> Vec<u32> {
    (0..n)
        .map(|i| 10 + ((i * 7 + i / 5 + seed * 31) % 200) as u32)
        .collect()
}

fn answers(streams: Vec<RequestStream>) -> Vec<Vec<u32>> {
    let finished = streams.into_iter().map(|stream| stream.finish().unwrap());
    finished.map(|generation| generation.tokens).collect()
}

#[test]
fn many_requests_get_what_each_gets_alone() {
    let model = load(demo());
    let options = GenerateOptions::greedy().max_new_tokens(48);
    let alone: Vec<_> = questions()
        .into_iter()
        .map(|prompt| model.generate(prompt, &options).unwrap())
        .collect();
    let engine = model.engine().max_sequences(7).build().unwrap();
    let streams: Vec<_> = questions()
        .into_iter()
        .map(|prompt| engine.submit(prompt, &options).unwrap())
        .collect();
    for (stream, alone) in streams.into_iter().zip(alone) {
        let mut text = String::new();
        let mut stream = stream;
        for piece in stream.by_ref() {
            text.push_str(&piece.unwrap().text);
        }
        let generation = stream.finish().unwrap();
        assert_eq!(generation.tokens, alone.tokens);
        assert_eq!((&text, &generation.text), (&alone.text, &alone.text));
        assert_eq!(generation.finish_reason, alone.finish_reason);
        assert_eq!(generation.usage.prompt_tokens, alone.usage.prompt_tokens);
    }
    let stats = engine.stats();
    assert_eq!((stats.submitted, stats.finished, stats.failed), (24, 24, 0));
    assert_eq!((stats.running, stats.waiting), (0, 0));
    // Each weight was read for several at a time.
    assert!(stats.steps < stats.completion_tokens, "{stats:?}");
}

#[test]
fn sampling_with_a_seed_is_the_same_alone_and_among_45_others_when_deterministic() {
    let model = load(fixture("bf16_shards"));
    let options = |seed| {
        greedy(40)
            .temperature(1.0)
            .repetition_penalty(1.05)
            .seed(seed)
    };
    let engine = model.engine().deterministic(true).build().unwrap();
    let own = || Prompt::Tokens(tokens(70, 0));
    let alone = engine.generate(own(), &options(1)).unwrap();
    let others: Vec<_> = (1..=45)
        .map(|i| {
            let prompt = Prompt::Tokens(tokens(5 + i, i));
            engine.submit(prompt, &options(i as u64)).unwrap()
        })
        .collect();
    let among = engine.generate(own(), &options(1)).unwrap();
    assert_eq!(alone.tokens, among.tokens);
    let fresh = model.engine().deterministic(true).build().unwrap();
    let fresh = fresh.generate(own(), &options(1)).unwrap();
    assert_eq!(alone.tokens, fresh.tokens);
    answers(others);
}

/// Whether caches are pages that sequences share.
fn is_paged() -> bool {
    common::device() == qwen2_core::Device::cpu()
}

#[test]
fn what_prompts_have_in_common_is_computed_once() {
    let model = unrounded(fixture("tied")).load().unwrap();
    let engine = model.engine().prefill_chunk(32).build().unwrap();
    let mut second = tokens(80, 1);
    second.truncate(60);
    second.extend(tokens(20, 2));
    for (prompt, cached) in [
        (tokens(80, 1), 0),
        (second.clone(), 60),
        (tokens(80, 1), 79),
        (second, 79),
        (tokens(80, 3), 0),
    ] {
        let alone = model
            .generate(Prompt::Tokens(prompt.clone()), &greedy(24))
            .unwrap();
        let generation = engine
            .generate(Prompt::Tokens(prompt), &greedy(24))
            .unwrap();
        assert_eq!(generation.usage.cached_tokens, cached);
        assert_eq!(generation.tokens, alone.tokens);
    }
    assert_eq!(engine.stats().cached_tokens, 60 + 79 + 79);
    let engine = model.engine().prefix_cache(false).build().unwrap();
    for _ in 0..2 {
        let prompt = Prompt::Tokens(tokens(80, 1));
        let generation = engine.generate(prompt, &greedy(4)).unwrap();
        assert_eq!(generation.usage.cached_tokens, 0);
    }
    // Where caches are no pages, the buffers of the last request are kept for the next.
    assert_eq!(engine.stats().cache_bytes == 0, is_paged());
}

/// The demo model's pages are of 512 positions: a prompt of 600 tokens has one whole and one begun.
#[test]
fn whole_pages_are_shared_and_forgotten_when_memory_is_short() {
    let model = load(demo());
    let page = model.memory().cache_per_token * 512;
    let engine = model.engine().cache_bytes(3 * page).build().unwrap();
    // The second prompt takes the place of what the first one has begun, not of its whole page.
    for (seed, cached) in [(1, 0), (1, 599), (2, 0), (1, 512)] {
        let prompt = Prompt::Tokens(tokens(600, seed));
        let alone = model.generate(prompt.clone(), &greedy(8)).unwrap();
        let generation = engine.generate(prompt, &greedy(8)).unwrap();
        assert_eq!(generation.usage.cached_tokens, cached, "{seed}");
        assert_eq!(generation.tokens, alone.tokens);
        assert!(engine.stats().cache_bytes <= 3 * page);
    }
}

#[test]
fn sequences_that_outgrow_the_memory_wait_and_are_computed_again() {
    let model = load(demo());
    let page = model.memory().cache_per_token * 512;
    let engine = model
        .engine()
        .cache_bytes(3 * page)
        .prefix_cache(false)
        .build()
        .unwrap();
    let prompts: Vec<_> = (1..=3)
        .map(|seed| Prompt::Tokens(tokens(300, seed)))
        .collect();
    let streams = prompts
        .iter()
        .map(|prompt| engine.submit(prompt.clone(), &greedy(300)).unwrap())
        .collect();
    let got = answers(streams);
    let stats = engine.stats();
    // Where caches are no pages, they have what is expected of them from the start.
    assert!(stats.preempted > 0 || !is_paged(), "{stats:?}");
    for (prompt, got) in prompts.into_iter().zip(got) {
        assert_eq!(got, model.generate(prompt, &greedy(300)).unwrap().tokens);
    }
}

#[test]
fn a_request_larger_than_the_memory_is_refused_and_the_others_go_on() {
    let model = load(demo());
    let page = model.memory().cache_per_token * 512;
    let engine = model.engine().cache_bytes(page).build().unwrap();
    let small = engine
        .submit(Prompt::Tokens(tokens(100, 1)), &greedy(20))
        .unwrap();
    let large = engine
        .submit(Prompt::Tokens(tokens(700, 2)), &greedy(20))
        .unwrap();
    let last = engine
        .submit(Prompt::Tokens(tokens(100, 3)), &greedy(20))
        .unwrap();
    let error = large.finish().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert_eq!(error.key(), Some("cache_bytes"));
    assert_eq!(small.finish().unwrap().tokens.len(), 20);
    assert_eq!(last.finish().unwrap().tokens.len(), 20);
    assert_eq!(engine.stats().failed, 1);
}

#[test]
fn a_short_prompt_answers_before_a_long_one_that_came_first() {
    let model = load(demo());
    let engine = model.engine().prefill_chunk(16).build().unwrap();
    let long = engine
        .submit(Prompt::Tokens(tokens(900, 1)), &greedy(1))
        .unwrap();
    let short = engine
        .submit(Prompt::Tokens(tokens(10, 2)), &greedy(1))
        .unwrap();
    short.finish().unwrap();
    let steps = engine.stats().steps;
    long.finish().unwrap();
    assert!(steps < engine.stats().steps);
}

#[test]
fn a_higher_priority_goes_first() {
    let model = load(demo());
    let engine = model.engine().max_sequences(1).build().unwrap();
    let first = engine
        .submit(Prompt::Tokens(tokens(20, 0)), &greedy(40))
        .unwrap();
    let submit = |priority, seed| {
        let request = Request::new(Prompt::Tokens(tokens(20, seed)), &greedy(20));
        engine.submit_request(request.priority(priority)).unwrap()
    };
    let (low, high) = (submit(0, 1), submit(1, 2));
    first.finish().unwrap();
    high.finish().unwrap();
    assert!(engine.stats().finished < 3, "the low one came first");
    low.finish().unwrap();
}

struct Fails {
    after: usize,
    panics: bool,
}

impl LogitsProcessor for Fails {
    fn process(&mut self, _: &[u32], logits: &mut [f32]) -> Result<(), Error> {
        self.after -= 1;
        if self.after > 0 {
            return Ok(());
        }
        assert!(!self.panics, "on purpose");
        logits.fill(f32::NAN);
        Ok(())
    }
}

#[test]
fn one_bad_request_does_not_disturb_its_neighbours() {
    let model = load(demo());
    let engine = model.engine().build().unwrap();
    let good: Vec<_> = (0..4)
        .map(|seed| {
            engine
                .submit(Prompt::Tokens(tokens(30, seed)), &greedy(30))
                .unwrap()
        })
        .collect();
    for (panics, kind) in [
        (false, ErrorKind::DeviceFailed),
        (true, ErrorKind::Internal),
    ] {
        let request = Request::new(Prompt::Tokens(tokens(30, 9)), &greedy(30));
        let request = request.processor(Fails { after: 5, panics });
        let mut stream = engine.submit_request(request).unwrap();
        let pieces: Vec<_> = stream.by_ref().collect();
        assert_eq!(pieces.len(), 5); // four tokens and the error
        assert_eq!(pieces[4].as_ref().unwrap_err().kind(), kind);
        assert!(stream.next().is_none());
    }
    for tokens in answers(good) {
        assert_eq!(tokens.len(), 30);
    }
    assert_eq!(engine.stats().failed, 2);
}

#[test]
fn cancelled_and_dropped_requests_leave_the_others_alone() {
    let model = load(demo());
    let engine = model.engine().build().unwrap();
    let submit = |seed| {
        engine
            .submit(Prompt::Tokens(tokens(30, seed)), &greedy(200))
            .unwrap()
    };
    let (mut cancelled, dropped, stays) = (submit(1), submit(2), submit(3));
    cancelled.next().unwrap().unwrap();
    cancelled.cancel_token().cancel();
    drop(dropped);
    let generation = cancelled.finish().unwrap();
    assert_eq!(generation.finish_reason, FinishReason::Cancelled);
    assert!(!generation.tokens.is_empty() && generation.tokens.len() < 200);
    assert_eq!(stays.finish().unwrap().tokens.len(), 200);
}

#[test]
fn a_reader_that_does_not_read_pauses_only_itself() {
    let model = load(demo());
    let engine = model.engine().build().unwrap();
    let unread = engine
        .submit(Prompt::Tokens(tokens(10, 1)), &greedy(400))
        .unwrap();
    let other = engine
        .submit(Prompt::Tokens(tokens(10, 2)), &greedy(500))
        .unwrap();
    assert_eq!(other.finish().unwrap().tokens.len(), 500);
    assert_eq!(engine.stats().running, 1);
    assert_eq!(engine.stats().completion_tokens, 500 + 256);
    assert_eq!(unread.finish().unwrap().tokens.len(), 400);
}

#[test]
fn a_reader_that_reads_nothing_for_too_long_loses_its_request() {
    let model = load(demo());
    let engine = model.engine().reader_patience(Duration::from_millis(50));
    let engine = engine.build().unwrap();
    let unread = engine
        .submit(Prompt::Tokens(tokens(10, 1)), &greedy(400))
        .unwrap();
    let start = Instant::now();
    while engine.stats().finished == 0 {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(5));
    }
    let generation = unread.finish().unwrap();
    assert_eq!(generation.finish_reason, FinishReason::Cancelled);
    assert_eq!(generation.tokens.len(), 256);
    assert_eq!(engine.stats().running, 0);
}

#[test]
fn a_full_queue_refuses_or_waits() {
    let model = load(demo());
    let build = |when_full| {
        let engine = model.engine().max_sequences(1).queue_limit(1);
        engine.when_full(when_full).build().unwrap()
    };
    let submit = |engine: &Engine, n| engine.submit(Prompt::Tokens(tokens(10, n)), &greedy(60));
    let engine = build(WhenFull::Refuse);
    let first = submit(&engine, 1).unwrap();
    while engine.stats().running == 0 {
        std::thread::yield_now();
    }
    let second = submit(&engine, 2).unwrap();
    let error = submit(&engine, 3).unwrap_err();
    assert_eq!(
        (error.kind(), error.key()),
        (ErrorKind::OutOfMemory, Some("queue_limit"))
    );
    answers(vec![first, second]);
    let engine = build(WhenFull::Wait);
    let streams = (0..5).map(|n| submit(&engine, n).unwrap()).collect();
    assert_eq!(answers(streams).len(), 5);
    // A request may want it otherwise than its engine.
    let mut streams = vec![submit(&engine, 1).unwrap(), submit(&engine, 2).unwrap()];
    let hasty = || {
        let request = Request::new(Prompt::Tokens(tokens(10, 3)), &greedy(60));
        engine.submit_request(request.when_full(WhenFull::Refuse))
    };
    // At once, or when the first has gone from the queue to be computed.
    let refused = loop {
        match hasty() {
            Ok(stream) => streams.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!(refused.key(), Some("queue_limit"));
    answers(streams);
}

#[test]
fn each_request_has_its_own_adapter() {
    let model = unrounded(fixture("tied")).load().unwrap();
    let adapter = root().join("conformance/adapters/plain");
    let adapted = model.with_adapter(adapter).unwrap();
    let engine = model.engine().build().unwrap();
    let prompt = || Prompt::Tokens(tokens(40, 1));
    let streams = [&model, &adapted, &model, &adapted].map(|handle| {
        let request = Request::new(prompt(), &greedy(20)).model(handle);
        engine.submit_request(request).unwrap()
    });
    let got = answers(streams.into());
    let alone = |model: &Model| model.generate(prompt(), &greedy(20)).unwrap().tokens;
    assert_eq!(got, [&model, &adapted, &model, &adapted].map(alone));
    assert_ne!(got[0], got[1]);
    let other = load(fixture("tied"));
    let error = engine
        .submit_request(Request::new(prompt(), &greedy(20)).model(&other))
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.key()),
        (ErrorKind::InvalidArgument, Some("model"))
    );
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            std::task::Poll::Ready(value) => return value,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}

#[test]
fn pieces_come_to_futures_as_to_iterators() {
    let model = load(demo());
    let engine = model.engine().build().unwrap();
    let prompt = || Prompt::Tokens(tokens(20, 1));
    let want = engine.generate(prompt(), &greedy(30)).unwrap().tokens;
    let mut stream = engine.submit(prompt(), &greedy(30)).unwrap();
    let got = block_on(async {
        let mut got = Vec::new();
        while let Some(piece) = stream.next_piece().await {
            got.push(piece.unwrap().token);
        }
        got
    });
    assert_eq!(got, want);
    let stream = engine.submit(prompt(), &greedy(30)).unwrap();
    assert_eq!(block_on(stream.finish_async()).unwrap().tokens, want);
}

#[test]
fn a_full_queue_lets_futures_wait_and_what_was_cancelled_in() {
    let model = load(demo());
    let engine = model.engine().max_sequences(1).queue_limit(1);
    let engine = engine.when_full(WhenFull::Wait).build().unwrap();
    let request = |seed, n| Request::new(Prompt::Tokens(tokens(10, seed)), &greedy(n));
    let running = engine.submit_request(request(1, 900)).unwrap();
    while engine.stats().running == 0 {
        std::thread::yield_now();
    }
    let waiting = engine.submit_request(request(2, 5)).unwrap();
    // Polled once it waits; dropped it is withdrawn.
    let poll = |future: &mut std::pin::Pin<Box<dyn Future<Output = _>>>| {
        let mut context = Context::from_waker(Waker::noop());
        future.as_mut().poll(&mut context).is_pending()
    };
    let mut withdrawn: std::pin::Pin<Box<dyn Future<Output = _>>> =
        Box::pin(engine.submit_async(request(3, 5)));
    assert!(poll(&mut withdrawn));
    drop(withdrawn);
    let mut options = greedy(5);
    let cancel = qwen2_core::CancelToken::new();
    options.cancel = Some(cancel.clone());
    let cancelled = std::thread::scope(|scope| {
        let submit = || engine.submit(Prompt::Tokens(tokens(10, 4)), &options);
        let thread = scope.spawn(submit);
        assert_eq!(engine.stats().submitted, 2);
        cancel.cancel();
        thread.join().unwrap().unwrap()
    });
    let generation = cancelled.finish().unwrap();
    assert_eq!(generation.finish_reason, FinishReason::Cancelled);
    drop(running);
    let last = block_on(engine.submit_async(request(5, 5))).unwrap();
    assert_eq!(answers(vec![waiting, last]).concat().len(), 10);
    assert_eq!(engine.stats().submitted, 4);
}

#[test]
fn closing_an_engine_ends_it_for_all_its_clones_and_their_futures() {
    let model = load(demo());
    let engine = model.engine().max_sequences(1).queue_limit(1);
    let engine = engine.when_full(WhenFull::Wait).build().unwrap();
    let request = |seed| Request::new(Prompt::Tokens(tokens(10, seed)), &greedy(900));
    let mut running = engine.submit_request(request(1)).unwrap();
    running.next().unwrap().unwrap();
    let waiting = engine.submit_request(request(2)).unwrap();
    let clone = engine.clone();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| block_on(clone.submit_async(request(3))).map(drop));
        engine.close();
        engine.close(); // again
        let error = thread.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
    });
    for mut stream in [running, waiting] {
        let error = stream.find_map(Result::err).unwrap();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert_eq!(
            error.to_string(),
            "engine was closed before the request ended"
        );
        assert!(error.help().is_some());
        assert!(stream.next().is_none());
        assert_eq!(stream.finish().unwrap_err().kind(), ErrorKind::Cancelled);
    }
    let error = clone.submit_request(request(4)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(error.to_string(), "engine was closed");
}

#[test]
fn dropping_the_engine_ends_its_requests() {
    let model = load(demo());
    let engine = model.engine().build().unwrap();
    let submit = |seed| {
        let prompt = Prompt::Tokens(tokens(10, seed));
        engine.submit(prompt, &greedy(800)).unwrap()
    };
    let mut streams = [submit(1), submit(2)];
    streams[0].next().unwrap().unwrap();
    drop(engine);
    for stream in streams {
        let error = stream.finish().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert!(error.to_string().starts_with("engine was closed"));
        assert!(error.help().is_some());
    }
}

#[test]
fn settings_of_zero_and_bad_requests_are_refused() {
    let model = load(fixture("tied"));
    for (engine, key) in [
        (model.engine().max_sequences(0), "max_sequences"),
        (model.engine().cache_bytes(0), "cache_bytes"),
        (model.engine().prefill_chunk(0), "prefill_chunk"),
        (model.engine().queue_limit(0), "queue_limit"),
    ] {
        let error = engine.build().unwrap_err();
        assert_eq!(
            (error.kind(), error.key()),
            (ErrorKind::InvalidArgument, Some(key))
        );
    }
    let engine = model.engine().build().unwrap();
    for (prompt, options, kind) in [
        (vec![], greedy(4), ErrorKind::InvalidArgument),
        (vec![100_000], greedy(4), ErrorKind::InvalidArgument),
        (tokens(100, 0), greedy(100), ErrorKind::ContextOverflow),
        (
            tokens(10, 0),
            greedy(4).temperature(-1.0),
            ErrorKind::InvalidArgument,
        ),
    ] {
        let error = engine.submit(Prompt::Tokens(prompt), &options).unwrap_err();
        assert_eq!(error.kind(), kind);
    }
    assert_eq!(engine.stats().submitted, 0);
}

#[test]
fn a_request_ends_when_its_time_is_over() {
    let engine = load(demo()).engine().build().unwrap();
    let submit = |timeout: f64| {
        let options = greedy(300).timeout(timeout);
        engine
            .submit(Prompt::Tokens(tokens(20, 1)), &options)
            .unwrap()
    };
    let (short, long) = (submit(1e-9), submit(1e9));
    let short = short.finish().unwrap();
    assert_eq!(short.finish_reason, FinishReason::Timeout);
    assert!(short.tokens.len() < 300);
    assert_eq!(long.finish().unwrap().finish_reason, FinishReason::Length);
}

#[test]
fn options_that_need_the_model_alone_are_refused() {
    let engine = load(fixture("tied")).engine().build().unwrap();
    for (options, key) in [
        (greedy(3).prompt_lookup(4), "prompt_lookup"),
        (greedy(3).draft_tokens(4), "draft_tokens"),
        (
            greedy(3).on_prefill(|_| std::ops::ControlFlow::Continue(())),
            "on_prefill",
        ),
    ] {
        let error = engine
            .submit(Prompt::Tokens(vec![5]), &options)
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.key()),
            (ErrorKind::Unsupported, Some(key))
        );
    }
}
