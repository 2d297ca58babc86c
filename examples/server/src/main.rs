//! The server as a program: `qwen2-server MODEL [HOST:PORT]`. The command `qwen2 serve` has more flags.
#![allow(clippy::print_stderr)] // a program talks to whoever started it

use std::error::Error;

use qwen2_core::Model;
use qwen2_server::{Server, Settings};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let model = args.next().ok_or("usage: qwen2-server MODEL [HOST:PORT]")?;
    let address = args.next().unwrap_or_else(|| "127.0.0.1:8000".to_owned());
    let mut settings = Settings::default();
    settings.api_key = std::env::var("QWEN2_API_KEY").ok();

    let server = Server::bind(Model::load(model.as_str())?, address, settings)?;
    eprintln!("{} at http://{}", server.name(), server.address());
    server.run()?;
    Ok(())
}
