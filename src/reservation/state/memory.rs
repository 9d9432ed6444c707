//! Rows in memory, for tests and for workers that need not remember over a restart.

use std::{
    collections::HashMap,
    sync::{PoisonError, RwLock},
};

use super::{Broken, Rows, Table, Write};

#[derive(Default)]
pub struct Memory(RwLock<[HashMap<Vec<u8>, Vec<u8>>; Table::ALL.len()]>);

impl Rows for Memory {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, Broken> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Ok(all[table as usize].get(key).cloned())
    }

    fn write(&self, writes: Vec<Write>) -> Result<(), Broken> {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (table, key, value) in writes {
            let rows = &mut all[table as usize];
            match value {
                Some(value) => drop(rows.insert(key, value)),
                None => drop(rows.remove(&key)),
            }
        }
        Ok(())
    }
}
