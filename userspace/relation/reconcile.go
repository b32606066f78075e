// SPDX-License-Identifier: Apache-2.0

//go:build !norelation

package relation

import (
	"context"
	"fmt"
	"slices"
)

// markSchema holds which tuples came from policy files, beside OpenFGA's own
// tables. withheld: an operator has deleted it since.
const markSchema = `CREATE TABLE IF NOT EXISTS sallyport_file_tuple (
	store TEXT NOT NULL, user TEXT NOT NULL, relation TEXT NOT NULL, object TEXT NOT NULL,
	withheld INTEGER NOT NULL DEFAULT 0,
	PRIMARY KEY (store, object, relation, user)) WITHOUT ROWID`

// Reconcile makes the tuples that came from policy files those that the files
// hold now: the wanted are written, those written by an earlier Reconcile and
// no longer wanted are deleted. Tuples that an operator wrote are left alone,
// and one that an operator deleted is not written again while the files still
// name it. Doing it twice changes nothing.
//
// A tuple is marked before it is written and unmarked after it is deleted, so
// that one broken off in between is completed by the next.
func (e *Engine) Reconcile(ctx context.Context, model string, wanted []Tuple) (Reconciled, error) {
	var done Reconciled
	if len(wanted) > maxFileTuples {
		return done, fmt.Errorf("reconcile relations: %d are more than %d", len(wanted), maxFileTuples)
	}
	want := make(map[Tuple]Tuple, len(wanted))
	for i := range wanted {
		if err := wanted[i].Validate(); err != nil {
			return done, fmt.Errorf("reconcile relations: tuple %d: %w", i+1, err)
		}
		want[wanted[i].key()] = wanted[i]
	}
	e.write.Lock()
	defer e.write.Unlock()
	if m := e.models.Load().find(model); m != nil && m.remote != nil {
		if len(want) > 0 {
			return done, fmt.Errorf("reconcile relations of model %q: its engine is elsewhere", m.name)
		}
		return done, nil // what it holds is not from files
	}
	m, err := e.find(model)
	if err != nil {
		return done, fmt.Errorf("reconcile relations: %w", err)
	}
	if err := e.reconcile(ctx, m, want, &done); err != nil {
		return done, fmt.Errorf("reconcile relations of model %q: %w", m.name, err)
	}
	if done.Written+done.Deleted+done.Withheld > 0 {
		e.opt.Log.Info("relations of policy files reconciled", "model", m.name,
			"written", done.Written, "deleted", done.Deleted, "withheld", done.Withheld)
	}
	return done, nil
}

func (e *Engine) reconcile(ctx context.Context, m *model, want map[Tuple]Tuple, done *Reconciled) error {
	marked, err := e.marks(ctx, m)
	if err != nil {
		return err
	}
	var gone, write []Tuple
	for t, withheld := range marked {
		if _, wanted := want[t]; !wanted {
			gone = append(gone, t)
		} else if withheld {
			done.Withheld++
		}
	}
	for key, t := range want {
		withheld, ours := marked[key]
		if withheld {
			continue
		}
		stored, there, err := e.get(ctx, m, &t)
		if err != nil {
			return err
		}
		if there && (!ours || stored.NotBefore.Equal(t.NotBefore) && stored.Expires.Equal(t.Expires)) {
			continue
		}
		write = append(write, t)
	}
	for part := range slices.Chunk(write, MaxTuples) {
		if err := e.mark(ctx, m, part, false); err != nil {
			return err
		}
		if err := e.put(ctx, m, part); err != nil {
			return err
		}
		done.Written += len(part)
	}
	for part := range slices.Chunk(gone, MaxTuples) {
		if err := e.remove(ctx, m, part); err != nil {
			return err
		}
		if err := e.unmark(ctx, m, part); err != nil {
			return err
		}
		done.Deleted += len(part)
	}
	return nil
}

// marks returns the tuples that came from files, and of each whether it is
// withheld.
func (e *Engine) marks(ctx context.Context, m *model) (map[Tuple]bool, error) {
	rows, err := e.db.QueryContext(ctx, "SELECT user, relation, object, withheld FROM sallyport_file_tuple WHERE store = ?", m.ids.Load().store)
	if err != nil {
		return nil, fmt.Errorf("read marks: %w", err)
	}
	defer rows.Close()
	out := make(map[Tuple]bool)
	for rows.Next() {
		var t Tuple
		var withheld bool
		if err := rows.Scan(&t.User, &t.Relation, &t.Object, &withheld); err != nil {
			return nil, fmt.Errorf("read marks: %w", err)
		}
		out[t] = withheld
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read marks: %w", err)
	}
	return out, nil
}

func (e *Engine) mark(ctx context.Context, m *model, tuples []Tuple, withheld bool) error {
	return e.eachMark(ctx, m, tuples, "INSERT OR REPLACE INTO sallyport_file_tuple (withheld, store, user, relation, object) VALUES (?, ?, ?, ?, ?)", withheld)
}

// withhold notes of tuples from files that an operator deletes them.
func (e *Engine) withhold(ctx context.Context, m *model, tuples []Tuple) error {
	return e.eachMark(ctx, m, tuples, "UPDATE sallyport_file_tuple SET withheld = ? WHERE store = ? AND user = ? AND relation = ? AND object = ?", true)
}

func (e *Engine) unmark(ctx context.Context, m *model, tuples []Tuple) error {
	return e.eachMark(ctx, m, tuples, "DELETE FROM sallyport_file_tuple WHERE store = ? AND user = ? AND relation = ? AND object = ?")
}

func (e *Engine) eachMark(ctx context.Context, m *model, tuples []Tuple, statement string, first ...any) error {
	if m.remote != nil {
		return nil // nothing of it is from files
	}
	tx, err := e.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("mark tuples: %w", err)
	}
	defer tx.Rollback()
	for i := range tuples {
		t := &tuples[i]
		args := append(slices.Clone(first), m.ids.Load().store, t.User, t.Relation, t.Object)
		if _, err := tx.ExecContext(ctx, statement, args...); err != nil {
			return fmt.Errorf("mark tuples: %w", err)
		}
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("mark tuples: %w", err)
	}
	return nil
}
