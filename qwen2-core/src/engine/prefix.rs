//! What prompts have in common, kept: a tree of pages by their tokens.

use std::sync::Arc;

use crate::generate::Network;
use crate::model::cache::{Cache, Page};

/// Fewer tokens in common are computed anew: to share part of a page copies it.
const LEAST: usize = 16;

/// The pages of one network: its adapters change what keys and values are.
pub(super) struct PrefixCache {
    trees: Vec<Tree>,
    bytes: u64,
    clock: u64,
}

struct Tree {
    network: Arc<Network>,
    children: Vec<Node>,
}

/// A page behind those of its parents.
struct Node {
    /// As many as the page holds; fewer in a page that is not full, which has no children.
    tokens: Vec<u32>,
    page: Page,
    children: Vec<Node>,
    /// When it was last shared.
    used: u64,
    /// Running sequences that build on it.
    pins: usize,
}

/// A part of the tree that a sequence begins with.
pub(super) struct Found {
    pub(super) pages: Vec<Page>,
    /// Positions in them that the sequence has.
    pub(super) n_tokens: usize,
    /// Whole pages of these, now pinned.
    pub(super) n_pinned: usize,
}

impl PrefixCache {
    pub(super) fn new() -> Self {
        Self {
            trees: Vec::new(),
            bytes: 0,
            clock: 0,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The pages that hold the beginning of `tokens`, at most all of them but `spare`. Whole pages that
    /// `cache` will share are pinned until [`Self::unpin`].
    pub(super) fn find(
        &mut self,
        network: &Arc<Network>,
        tokens: &[u32],
        cache: &Cache,
        spare: usize,
    ) -> Found {
        self.clock += 1;
        let mut found = Found {
            pages: Vec::new(),
            n_tokens: 0,
            n_pinned: 0,
        };
        let tokens = &tokens[..tokens.len().saturating_sub(spare)];
        let clock = self.clock;
        let mut children = match self.tree(network) {
            Some(tree) => &mut tree.children,
            None => return found,
        };
        loop {
            let rest = &tokens[found.n_tokens..];
            let best = children
                .iter_mut()
                .max_by_key(|child| common(&child.tokens, rest));
            let Some(child) = best else { break };
            let n = common(&child.tokens, rest);
            if n < LEAST {
                break;
            }
            found.pages.push(child.page.clone());
            found.n_tokens += n;
            child.used = clock;
            if n < child.page.capacity() {
                break;
            }
            if cache.shares_pages() {
                child.pins += 1;
                found.n_pinned += 1;
            }
            children = &mut child.children;
        }
        found
    }

    /// Lets go of the first `n_pinned` whole pages of a sequence.
    pub(super) fn unpin(&mut self, network: &Arc<Network>, tokens: &[u32], n_pinned: usize) {
        let Some(mut children) = self.tree(network).map(|tree| &mut tree.children) else {
            return;
        };
        let mut start = 0;
        for _ in 0..n_pinned {
            let whole = |child: &&mut Node| tokens[start..].starts_with(&child.tokens);
            let full = |child: &&mut Node| child.tokens.len() == child.page.capacity();
            let Some(child) = children.iter_mut().filter(full).find(whole) else {
                return;
            };
            child.pins -= 1;
            start += child.tokens.len();
            children = &mut child.children;
        }
    }

    /// Adds what the cache of a sequence holds. Of its whole pages, which the tree has now, those behind
    /// the first `n_pinned` are pinned as well if the cache shares them; how many are in all. A page that
    /// is not full is copied for a sequence that `goes_on` only where that costs nothing.
    pub(super) fn add(
        &mut self,
        network: &Arc<Network>,
        tokens: &[u32],
        cache: &Cache,
        n_pinned: usize,
        goes_on: bool,
    ) -> usize {
        let tokens = &tokens[..cache.n_tokens()];
        let Self {
            trees,
            bytes,
            clock,
        } = self;
        let mut children = &mut tree_or_new(trees, network).children;
        let mut n_whole = 0;
        for (index, part) in tokens.chunks(cache.page_capacity()).enumerate() {
            let page = || cache.page(index);
            if part.len() < cache.page_capacity() {
                if part.len() >= LEAST && (cache.shares_pages() || !goes_on) {
                    *bytes += add_tail(children, part, page, *clock);
                }
                break;
            }
            let place = children.iter().position(|child| child.tokens == part);
            let place = place.unwrap_or_else(|| {
                // Before anything changes: a device may have no memory for it.
                let page = page();
                // A page that holds the beginning of this one has no other use.
                if let Some(place) = children.iter().position(|child| {
                    child.pins == 0 && child.children.is_empty() && part.starts_with(&child.tokens)
                }) {
                    *bytes -= children.swap_remove(place).page.bytes();
                }
                *bytes += page.bytes();
                children.push(Node::new(part, page, *clock));
                children.len() - 1
            });
            let child = &mut children[place];
            if cache.shares_pages() {
                child.pins += usize::from(index >= n_pinned);
                n_whole += 1;
            }
            children = &mut child.children;
        }
        n_whole
    }

    /// Forgets the page that was shared longest ago; whether there was one that nothing builds on.
    pub(super) fn evict(&mut self) -> bool {
        let oldest = self
            .trees
            .iter()
            .filter_map(|tree| oldest(&tree.children))
            .min();
        let Some(used) = oldest else {
            return false;
        };
        let gone = self
            .trees
            .iter_mut()
            .find_map(|tree| remove(&mut tree.children, used));
        self.bytes -= gone.map_or(0, |node| node.page.bytes());
        self.trees.retain(|tree| !tree.children.is_empty());
        true
    }

    fn tree(&mut self, network: &Arc<Network>) -> Option<&mut Tree> {
        self.trees
            .iter_mut()
            .find(|tree| Arc::ptr_eq(&tree.network, network))
    }
}

fn tree_or_new<'a>(trees: &'a mut Vec<Tree>, network: &Arc<Network>) -> &'a mut Tree {
    let place = trees
        .iter()
        .position(|tree| Arc::ptr_eq(&tree.network, network));
    let place = place.unwrap_or_else(|| {
        trees.push(Tree {
            network: network.clone(),
            children: Vec::new(),
        });
        trees.len() - 1
    });
    &mut trees[place]
}

impl Node {
    fn new(tokens: &[u32], page: Page, used: u64) -> Self {
        Self {
            tokens: tokens.to_vec(),
            page,
            children: Vec::new(),
            used,
            pins: 0,
        }
    }
}

/// Adds a page that is not full; by how many bytes the tree grew.
fn add_tail(
    children: &mut Vec<Node>,
    tokens: &[u32],
    page: impl FnOnce() -> Page,
    clock: u64,
) -> u64 {
    if children
        .iter()
        .any(|child| child.tokens.starts_with(tokens))
    {
        return 0;
    }
    let page = page();
    let bytes = page.bytes();
    let shorter = |child: &&mut Node| tokens.starts_with(&child.tokens);
    match children.iter_mut().find(shorter) {
        Some(child) => {
            *child = Node::new(tokens, page, clock);
            0
        }
        None => {
            children.push(Node::new(tokens, page, clock));
            bytes
        }
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// When the leaf that was used longest ago was used.
fn oldest(children: &[Node]) -> Option<u64> {
    let of = |node: &Node| match node.children.is_empty() {
        true => (node.pins == 0).then_some(node.used),
        false => oldest(&node.children),
    };
    children.iter().filter_map(of).min()
}

/// Takes out a leaf that was used then.
fn remove(children: &mut Vec<Node>, used: u64) -> Option<Node> {
    let is_it = |node: &Node| node.children.is_empty() && node.pins == 0 && node.used == used;
    match children.iter().position(is_it) {
        Some(place) => Some(children.swap_remove(place)),
        None => children
            .iter_mut()
            .find_map(|node| remove(&mut node.children, used)),
    }
}
