//! Byte-pair encoding over flat tables. Qwen2's file has 151,643 tokens and as many merges: with a string or
//! three for each, as the tokenizers crate keeps them, reading them takes most of the time to a first token.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashMap, HashTable};

/// Tokens with their ids, as one text.
#[derive(Default)]
pub(super) struct Vocabulary {
    text: String,
    entries: Vec<Entry>,
    /// Entries by their token.
    by_token: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

#[derive(Clone, Copy)]
struct Entry {
    start: u32,
    end: u32,
    id: u32,
}

/// Pairs of tokens in the order of their ranks, as one text.
#[derive(Default)]
pub(super) struct MergeList {
    text: String,
    /// Where the first token of each pair ends, and the second.
    ends: Vec<(u32, u32)>,
}

/// What does not fit into 32 bits, or names a token that is not there.
#[derive(Debug)]
pub(super) struct Misfit(pub(super) String);

fn place(at: usize) -> Result<u32, Misfit> {
    u32::try_from(at).map_err(|_| Misfit("the tokens are longer than 4 GB in all".to_owned()))
}

impl Vocabulary {
    /// The last id of a token that comes twice holds, as in a map.
    pub(super) fn insert(&mut self, token: &str, id: u32) -> Result<(), Misfit> {
        let hash = self.hasher.hash_one(token);
        let (text, entries) = (&mut self.text, &mut self.entries);
        let is_it = |index: &u32| entries[*index as usize].token(text) == token;
        if let Some(&index) = self.by_token.find(hash, is_it) {
            entries[index as usize].id = id;
            return Ok(());
        }
        let (index, start) = (place(entries.len())?, place(text.len())?);
        text.push_str(token);
        let end = place(text.len())?;
        entries.push(Entry { start, end, id });
        let hasher = &self.hasher;
        let rehash = |index: &u32| hasher.hash_one(entries[*index as usize].token(text));
        self.by_token.insert_unique(hash, index, rehash);
        Ok(())
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        let is_it = |index: &u32| self.entries[*index as usize].token(&self.text) == token;
        let hash = self.hasher.hash_one(token);
        let index = self.by_token.find(hash, is_it)?;
        Some(self.entries[*index as usize].id)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// All tokens with their ids, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        let entries = self.entries.iter();
        entries.map(|entry| (entry.token(&self.text), entry.id))
    }
}

impl Entry {
    fn token(self, text: &str) -> &str {
        &text[self.start as usize..self.end as usize]
    }
}

impl MergeList {
    pub(super) fn push(&mut self, first: &str, second: &str) -> Result<(), Misfit> {
        let (first, second) = (self.add(first)?, self.add(second)?);
        self.pair(first, second);
        Ok(())
    }

    /// Puts down one token of a pair, and tells where it ends.
    pub(super) fn add(&mut self, token: &str) -> Result<u32, Misfit> {
        self.text.push_str(token);
        place(self.text.len())
    }

    /// The pair of the two tokens that were put down last.
    pub(super) fn pair(&mut self, first: u32, second: u32) {
        self.ends.push((first, second));
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut start = 0;
        self.ends.iter().map(move |&(middle, end)| {
            let pair = (start, middle as usize, end as usize);
            start = pair.2;
            (&self.text[pair.0..pair.1], &self.text[pair.1..pair.2])
        })
    }
}

/// The model: tokens, and what two of them become.
pub(super) struct Tables {
    vocabulary: Vocabulary,
    /// Entries in the order of their ids.
    by_id: Vec<u32>,
    /// Of two tokens: the rank of their merge, and what it gives.
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// A text that is a token is that token, whatever merges say.
    pub(super) ignore_merges: bool,
}

/// A piece of a word while it is merged.
#[derive(Clone, Copy)]
struct Piece {
    id: u32,
    /// Bytes; 0 when it was merged into the one before.
    len: usize,
    previous: usize,
    next: usize,
}

/// No piece.
const END: usize = usize::MAX;

impl Tables {
    /// # Errors
    /// If a merge names or makes a token that is not there.
    pub(super) fn new(vocabulary: Vocabulary, list: &MergeList) -> Result<Self, Misfit> {
        let known = |token: &str| {
            let id = vocabulary.id(token);
            id.ok_or_else(|| Misfit(format!("Token `{token}` out of vocabulary")))
        };
        let mut merges = HashMap::with_capacity(list.ends.len());
        let mut start = 0;
        for (rank, ((first, second), &(_, end))) in (0..).zip(list.iter().zip(&list.ends)) {
            // The two lie side by side.
            let merged = &list.text[start..end as usize];
            start = end as usize;
            merges.insert((known(first)?, known(second)?), (rank, known(merged)?));
        }
        let entries = &vocabulary.entries;
        let mut by_id: Vec<u32> = (0..entries.len() as u32).collect();
        by_id.sort_by_key(|index| entries[*index as usize].id);
        Ok(Self {
            vocabulary,
            by_id,
            merges,
            ignore_merges: false,
        })
    }

    pub(super) fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    pub(super) fn token(&self, id: u32) -> Option<&str> {
        let entries = &self.vocabulary.entries;
        let id_of = |index: &u32| entries[*index as usize].id;
        let place = self.by_id.binary_search_by_key(&id, id_of).ok()?;
        Some(entries[self.by_id[place] as usize].token(&self.vocabulary.text))
    }

    /// The tokens of a word, each with its length in bytes. Characters that are no token are left out.
    pub(super) fn encode(&self, word: &str) -> Vec<(u32, usize)> {
        if self.ignore_merges
            && let Some(id) = self.vocabulary.id(word)
        {
            return vec![(id, word.len())];
        }
        let mut pieces = self.pieces(word);
        let merge = |pieces: &[Piece], at: usize| {
            let piece = pieces[at];
            let next = pieces.get(piece.next)?;
            let &(rank, id) = self.merges.get(&(piece.id, next.id))?;
            Some(Reverse((rank, at, id)))
        };
        let all = (0..pieces.len()).filter_map(|at| merge(&pieces, at));
        // The lowest rank first, and of those the leftmost.
        let mut queue: BinaryHeap<_> = all.collect();
        while let Some(Reverse((_, at, id))) = queue.pop() {
            // One of the two may have become another, or part of another.
            let is_now = merge(&pieces, at).is_some_and(|Reverse((_, _, now))| now == id);
            if pieces[at].len == 0 || !is_now {
                continue;
            }
            let taken = pieces[at].next;
            let Piece { len, next, .. } = pieces[taken];
            pieces[taken].len = 0;
            pieces[at].id = id;
            pieces[at].len += len;
            pieces[at].next = next;
            if let Some(next) = pieces.get_mut(next) {
                next.previous = at;
            }
            let previous = pieces[at].previous;
            let sides = [previous, at].into_iter().filter(|at| *at != END);
            queue.extend(sides.filter_map(|at| merge(&pieces, at)));
        }
        let left = pieces.iter().filter(|piece| piece.len > 0);
        left.map(|piece| (piece.id, piece.len)).collect()
    }

    fn pieces(&self, word: &str) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::with_capacity(word.len());
        let mut letter = [0; 4];
        for c in word.chars() {
            let text = c.encode_utf8(&mut letter);
            if let Some(id) = self.vocabulary.id(text) {
                let at = pieces.len();
                pieces.push(Piece {
                    id,
                    len: text.len(),
                    previous: at.wrapping_sub(1), // END for the first
                    next: at + 1,
                });
            }
        }
        pieces
    }
}
