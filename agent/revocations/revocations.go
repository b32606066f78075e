// SPDX-License-Identifier: Apache-2.0

// Package revocations keeps what has been revoked: identities, certificate
// serials, token ids, subjects and issuers. The list is on disk before a
// revocation is answered, so it outlives SIGKILL and restart, and it is read
// before anything is served: a damaged file stops the start, because nobody
// could say what it had forbidden.
package revocations

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	// MaxEntries bounds the list; beyond it a revocation is refused, never
	// an older one forgotten.
	MaxEntries = 10000
	// MaxValue bounds what an entry names, in bytes.
	MaxValue = 1024
	// MaxReason bounds why and by whom, in bytes.
	MaxReason = 256

	fileName    = "revocations.json"
	fileVersion = 1
	maxFile     = 16 << 20
)

// Kind says what a revocation's value names.
type Kind string

// The kinds.
const (
	Identity Kind = "identity" // a SPIFFE ID
	Serial   Kind = "serial"   // of a certificate, lower-case hex
	JTI      Kind = "jti"      // a token's "iss|jti", or the jti of any issuer's
	Subject  Kind = "subject"  // "iss|sub", as decisions name it
	Issuer   Kind = "issuer"   // an issuer, with every token of its
)

// Kinds lists the kinds in the order in which they are shown.
var Kinds = []Kind{Identity, Serial, JTI, Subject, Issuer}

// Entry is one revocation.
type Entry struct {
	Kind   Kind      `json:"kind"`
	Value  string    `json:"value"`
	Since  time.Time `json:"since"`           // nothing issued or opened before holds
	Until  time.Time `json:"until,omitzero"`  // zero: for good
	Reason string    `json:"reason,omitzero"` // for operators
	By     string    `json:"by,omitzero"`     // who asked for it
}

// ended says whether the entry is past its end.
func (e *Entry) ended(now time.Time) bool { return !e.Until.IsZero() && !now.Before(e.Until) }

// Errors that callers branch on.
var (
	ErrFull     = fmt.Errorf("the revocation list is full (%d): lift some, or let them end", MaxEntries)
	ErrNotFound = errors.New("no such revocation")
	ErrDamaged  = errors.New("the revocation list on disk is damaged")
)

type key struct {
	kind  Kind
	value string
}

// Store is the list, in memory and on disk. Its methods may be used from any
// goroutine.
type Store struct {
	path string
	now  func() time.Time

	// change is held from the look at the list to the end of telling of its
	// change: one change after the other.
	change  sync.Mutex
	changed func([]Entry, uint64)

	mu         sync.RWMutex
	entries    map[key]Entry // replaced, never changed
	generation uint64
}

type document struct {
	Version    int     `json:"version"`
	Generation uint64  `json:"generation"`
	Entries    []Entry `json:"entries"`
}

// Open reads the list in dir, the agent's state directory; a directory
// without one is an empty list. now is nil for the system's clock.
func Open(dir string, now func() time.Time) (*Store, error) {
	if now == nil {
		now = time.Now
	}
	s := &Store{path: filepath.Join(dir, fileName), now: now, entries: map[key]Entry{}}
	b, err := readBounded(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read revocations: %w", err)
	}
	doc, err := decode(b)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w; restore it, or remove it to forget what was revoked", s.path, err)
	}
	s.generation = doc.Generation
	for _, e := range doc.Entries {
		if !e.ended(now()) {
			s.entries[key{e.Kind, e.Value}] = e
		}
	}
	return s, nil
}

// OnChange has f called with the whole list after each change of it, once at
// a time and in order; and once now. f may call List, and must not change the
// list.
func (s *Store) OnChange(f func(entries []Entry, generation uint64)) {
	s.change.Lock()
	defer s.change.Unlock()
	s.changed = f
	f(s.List())
}

// Revoke adds an entry, and replaces one of the same kind and value. ttl is
// how long it holds, 0 for good. It is on disk when Revoke returns.
func (s *Store) Revoke(kind Kind, value string, ttl time.Duration, reason, by string) (Entry, error) {
	return s.add(kind, value, ttl, reason, by, true)
}

// Extend is Revoke for who may revoke and not lift: an entry that holds as
// long, or longer, stays as it is and is returned.
func (s *Store) Extend(kind Kind, value string, ttl time.Duration, reason, by string) (Entry, error) {
	return s.add(kind, value, ttl, reason, by, false)
}

func (s *Store) add(kind Kind, value string, ttl time.Duration, reason, by string, replace bool) (Entry, error) {
	if ttl < 0 {
		return Entry{}, fmt.Errorf("revoke %s: a negative ttl", kind)
	}
	s.change.Lock()
	defer s.change.Unlock()
	e := Entry{Kind: kind, Value: value, Since: s.now().UTC(), Reason: reason, By: by}
	if ttl > 0 {
		e.Until = e.Since.Add(ttl)
	}
	if err := e.validate(); err != nil {
		return Entry{}, fmt.Errorf("revoke: %w", err)
	}
	next, _ := s.present()
	k := key{kind, value}
	old, had := next[k]
	if had && !replace && (old.Until.IsZero() || !e.Until.IsZero() && !e.Until.After(old.Until)) {
		return old, nil
	}
	if !had && len(next) >= MaxEntries {
		return Entry{}, ErrFull
	}
	next[k] = e
	return e, s.commit(next)
}

// Lift ends a revocation before its time.
func (s *Store) Lift(kind Kind, value string) error {
	s.change.Lock()
	defer s.change.Unlock()
	next, _ := s.present()
	k := key{kind, value}
	if _, had := next[k]; !had {
		return fmt.Errorf("%w: %s %s", ErrNotFound, kind, value)
	}
	delete(next, k)
	return s.commit(next)
}

// Expire drops what is past its end, and tells so if there was any. The agent
// calls it now and then; an entry that has ended does not hold before either.
func (s *Store) Expire() error {
	s.change.Lock()
	defer s.change.Unlock()
	next, ended := s.present()
	if !ended {
		return nil
	}
	return s.commit(next)
}

// List returns what holds now, oldest first, and the list's generation, which
// grows with each change.
func (s *Store) List() ([]Entry, uint64) {
	s.mu.RLock()
	entries, generation := s.entries, s.generation
	s.mu.RUnlock()
	return sorted(entries, s.now()), generation
}

// present returns a copy of what holds now; ended says that something else
// did before.
func (s *Store) present() (entries map[key]Entry, ended bool) {
	now := s.now()
	entries = maps.Clone(s.entries)
	maps.DeleteFunc(entries, func(_ key, e Entry) bool { return e.ended(now) })
	return entries, len(entries) < len(s.entries)
}

// sorted lists the entries that hold at that time.
func sorted(entries map[key]Entry, now time.Time) []Entry {
	all := make([]Entry, 0, len(entries))
	for _, e := range entries {
		if !e.ended(now) {
			all = append(all, e)
		}
	}
	slices.SortFunc(all, func(a, b Entry) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Value, b.Value))
	})
	return all
}

// commit writes the list, puts it in force and tells of it. What cannot be
// written did not happen.
func (s *Store) commit(next map[key]Entry) error {
	b, err := encode(document{fileVersion, s.generation + 1, sorted(next, s.now())})
	if err == nil {
		err = writeAtomic(s.path, b)
	}
	if err != nil {
		return fmt.Errorf("write revocations: %w", err)
	}
	s.mu.Lock()
	s.entries = next
	s.generation++
	s.mu.Unlock()
	if s.changed != nil {
		s.changed(s.List())
	}
	return nil
}

func (e *Entry) validate() error {
	if !slices.Contains(Kinds, e.Kind) {
		return fmt.Errorf("kind %q is not one of identity, serial, jti, subject, issuer", e.Kind)
	}
	if e.Value == "" || len(e.Value) > MaxValue || !printable(e.Value) {
		return fmt.Errorf("%s: a value of 1 to %d printable bytes is needed", e.Kind, MaxValue)
	}
	if len(e.Reason) > MaxReason || !printable(e.Reason) || len(e.By) > MaxReason || !printable(e.By) {
		return fmt.Errorf("%s: a reason of at most %d printable bytes is needed", e.Kind, MaxReason)
	}
	if e.Kind == Serial && strings.ContainsFunc(e.Value, func(r rune) bool { return !strings.ContainsRune("0123456789abcdef", r) }) {
		return fmt.Errorf("serial %s: lower-case hex digits are needed", e.Value)
	}
	if e.Kind == Subject && !strings.Contains(e.Value, "|") {
		return fmt.Errorf("subject %s: write ISSUER|SUBJECT", e.Value)
	}
	if e.Kind == Identity && !strings.HasPrefix(e.Value, "spiffe://") {
		return fmt.Errorf("identity %s: a SPIFFE ID is needed (spiffe://...)", e.Value)
	}
	return nil
}

func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

// encode puts the SHA-256 of the JSON document before it, as a line of hex.
func encode(d document) ([]byte, error) {
	b, err := json.Marshal(d)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	return append(append([]byte(hex.EncodeToString(sum[:])), '\n'), b...), nil
}

// decode is the inverse of encode; anything else is ErrDamaged.
func decode(b []byte) (document, error) {
	var d document
	line, body, ok := strings.Cut(string(b), "\n")
	sum := sha256.Sum256([]byte(body))
	if !ok || line != hex.EncodeToString(sum[:]) {
		return d, fmt.Errorf("%w: the checksum does not fit", ErrDamaged)
	}
	if err := json.Unmarshal([]byte(body), &d); err != nil {
		return d, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if d.Version != fileVersion {
		return d, fmt.Errorf("%w: layout version %d, want %d", ErrDamaged, d.Version, fileVersion)
	}
	if len(d.Entries) > MaxEntries {
		return d, fmt.Errorf("%w: %d entries, at most %d", ErrDamaged, len(d.Entries), MaxEntries)
	}
	for i := range d.Entries {
		if err := d.Entries[i].validate(); err != nil {
			return d, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
	}
	return d, nil
}

func readBounded(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxFile {
		return nil, fmt.Errorf("%s: not a regular file of at most %d bytes", path, maxFile)
	}
	return os.ReadFile(path)
}

// writeAtomic replaces path so that a crash at any moment leaves the old or
// the new content, whole.
func writeAtomic(path string, b []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+fileName+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
