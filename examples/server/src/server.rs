//! The server as a program that embeds it sees it.

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::time::Duration;

use qwen2_core::Model;

use crate::connections;
use crate::settings::Settings;
use crate::signals::asked_to_end;
use crate::state::App;

/// Threads that move bytes; the model computes on its own.
const THREADS: usize = 2;

/// A server that listens but does not answer yet.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    app: App,
}

impl Server {
    /// Listens at `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// If the address is none, or taken, or the system gives no thread.
    pub fn bind(model: Model, address: impl ToSocketAddrs, settings: Settings) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            address: listener.local_addr()?,
            listener,
            app: App::new(&model, settings)?,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The name under which clients ask for the model.
    pub fn name(&self) -> &str {
        &self.app.name
    }

    /// Answers until `shutdown` resolves; then accepts nothing more, lets running answers go on for the
    /// time of [`Settings::grace`], and stops those that are left. Runs on the tokio runtime of the
    /// caller, which needs its time and its I/O.
    ///
    /// # Errors
    /// If the listener cannot be handed to tokio.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        connections::serve(listener, self.app, shutdown).await;
        Ok(())
    }

    /// Answers on threads of its own until SIGINT or SIGTERM (elsewhere Ctrl-C), whose handlers it
    /// installs; then as [`Server::serve`].
    ///
    /// # Errors
    /// If the threads cannot be started.
    pub fn run(self) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .enable_all()
            .build()?;
        let outcome = runtime.block_on(self.serve(asked_to_end()));
        // What still computes has been told to stop, and looks at that after each chunk of tokens.
        runtime.shutdown_timeout(Duration::from_secs(5));
        outcome
    }
}
