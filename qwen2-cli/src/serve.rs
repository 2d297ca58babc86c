//! `qwen2 serve`: the model over HTTP, until a signal ends it.

use std::time::Duration;

use qwen2_server::{Server, Settings};

use crate::args::ServeArgs;
use crate::failure::Failure;
use crate::{load, output};

pub(crate) fn run(args: &ServeArgs) -> Result<(), Failure> {
    let settings = settings(args)?;
    let model = load::load(args.model.as_deref(), &args.load)?;
    model.warmup()?;
    let server = Server::bind(model, (args.host.as_str(), args.port), settings);
    let server = server.map_err(|error| {
        Failure::new(
            format!("cannot listen at {}:{}: {error}", args.host, args.port),
            "choose another --host or --port; port 0 takes a free one",
        )
    })?;
    let (name, address) = (server.name(), server.address());
    output::note(&format!(
        "{name} at http://{address}, API at http://{address}/v1"
    ));
    Ok(server.run()?)
}

fn settings(args: &ServeArgs) -> Result<Settings, Failure> {
    let mut settings = Settings::default();
    settings.name.clone_from(&args.name);
    settings.api_key = match &args.api_key {
        Some(key) => Some(key.clone()),
        None => std::env::var("QWEN2_API_KEY").ok(),
    };
    if settings.api_key.as_deref() == Some("") {
        // A variable that is meant to hold a key and is empty must not open the door.
        return Err(Failure::usage(
            "the API key is empty",
            "give one, or leave --api-key and QWEN2_API_KEY unset",
        ));
    }
    settings.max_body = args.max_body;
    settings.max_new_tokens = args.max_new_tokens;
    settings.pooling = args.pooling.parse()?;
    settings.max_running = args.max_running;
    settings.max_waiting = args.max_waiting;
    settings.cache_memory = args.cache_memory;
    settings.prefix_cache = !args.no_prefix_cache;
    settings.deterministic = args.deterministic;
    settings.max_connections = args.max_connections;
    settings.timeout = Duration::from_secs(args.timeout);
    settings.patience = Duration::from_secs(args.patience);
    settings.grace = Duration::from_secs(args.grace);
    Ok(settings)
}
