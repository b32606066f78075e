// SPDX-License-Identifier: Apache-2.0

package revocations

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func open(t testing.TB, dir string, c *clock) *Store {
	t.Helper()
	s, err := Open(dir, c.now)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newClock() *clock { return &clock{time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)} }

const id = "spiffe://example.org/ns/shop/sa/checkout"

func TestRevokeOutlivesReopen(t *testing.T) {
	dir, c := t.TempDir(), newClock()
	s := open(t, dir, c)
	var told []int
	s.OnChange(func(e []Entry, generation uint64) {
		told = append(told, len(e))
		if now, g := s.List(); len(now) != len(e) || g != generation {
			t.Errorf("told of %d at %d, the list has %d at %d", len(e), generation, len(now), g)
		}
	})
	if _, err := s.Revoke(Identity, id, 0, "stolen", "root"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Revoke(JTI, "t-1", time.Minute, "", "root"); err != nil {
		t.Fatal(err)
	}
	got, gen := open(t, dir, c).List()
	if len(got) != 2 || gen != 2 || got[0].Value != id && got[1].Value != id {
		t.Fatalf("after reopening: %v, generation %d", got, gen)
	}
	c.t = c.t.Add(time.Minute)
	if got, _ := s.List(); len(got) != 1 || got[0].Kind != Identity || got[0].Reason != "stolen" {
		t.Fatalf("after its time: %v", got)
	}
	if err := s.Expire(); err != nil {
		t.Fatal(err)
	}
	if err := s.Lift(Identity, id); err != nil {
		t.Fatal(err)
	}
	if err := s.Lift(Identity, id); !errors.Is(err, ErrNotFound) {
		t.Fatalf("lifted twice: %v", err)
	}
	if got, gen := open(t, dir, c).List(); len(got) != 0 || gen != 4 {
		t.Fatalf("after lifting: %v, generation %d", got, gen)
	}
	if fmt.Sprint(told) != "[0 1 2 1 0]" {
		t.Errorf("told %v", told)
	}
	if st, err := os.Stat(filepath.Join(dir, fileName)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if files, _ := os.ReadDir(dir); len(files) != 1 {
		t.Errorf("left behind: %v", files)
	}
}

// Who may only extend shortens nothing: neither what an operator revoked for
// good nor what holds for longer.
func TestExtendNeverShortens(t *testing.T) {
	for _, c := range []struct {
		name        string
		had, ttl    time.Duration // had < 0: nothing
		want        time.Duration // 0: for good
		by          string
		generations uint64
	}{
		{"nothing there", -1, time.Minute, time.Minute, "score", 1},
		{"for good", 0, time.Minute, 0, "root", 1},
		{"longer", time.Hour, time.Minute, time.Hour, "root", 1},
		{"as long", time.Minute, time.Minute, time.Minute, "root", 1},
		{"shorter", time.Second, time.Minute, time.Minute, "score", 2},
		{"then for good", time.Hour, 0, 0, "score", 2},
	} {
		c0 := newClock()
		s := open(t, t.TempDir(), c0)
		if c.had >= 0 {
			if _, err := s.Revoke(Identity, id, c.had, "", "root"); err != nil {
				t.Fatal(err)
			}
		}
		e, err := s.Extend(Identity, id, c.ttl, "", "score")
		if err != nil {
			t.Fatal(err)
		}
		held, generation := s.List()
		if len(held) != 1 || held[0] != e || e.By != c.by || generation != c.generations {
			t.Errorf("%s: %v at generation %d, answered %v", c.name, held, generation, e)
		}
		if c.want == 0 && !e.Until.IsZero() || c.want > 0 && !e.Until.Equal(c0.t.Add(c.want)) {
			t.Errorf("%s: until %v", c.name, e.Until)
		}
	}
}

func TestRevokeRefuses(t *testing.T) {
	s := open(t, t.TempDir(), newClock())
	for _, c := range []struct {
		kind          Kind
		value, reason string
		ttl           time.Duration
		want          string
	}{
		{"user", "x", "", 0, "not one of"},
		{JTI, "", "", 0, "printable"},
		{JTI, strings.Repeat("x", MaxValue+1), "", 0, "printable"},
		{JTI, "a\nb", "", 0, "printable"},
		{JTI, "a\xff", "", 0, "printable"},
		{JTI, "x", strings.Repeat("x", MaxReason+1), 0, "reason"},
		{JTI, "x", "\x1b[2J", 0, "reason"},
		{Serial, "0A", "", 0, "hex"},
		{Subject, "alice", "", 0, "ISSUER|SUBJECT"},
		{Identity, "checkout", "", 0, "SPIFFE"},
		{JTI, "x", "", -1, "negative"},
	} {
		if _, err := s.Revoke(c.kind, c.value, c.ttl, c.reason, ""); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %q: %v, want %s", c.kind, c.value, err, c.want)
		}
	}
	if got, _ := s.List(); len(got) != 0 {
		t.Errorf("kept: %v", got)
	}
}

func TestFullListRefusesAndForgetsNothing(t *testing.T) {
	dir, c := t.TempDir(), newClock()
	s := open(t, dir, c)
	for i := range MaxEntries {
		v := fmt.Sprint("t-", i)
		s.entries[key{JTI, v}] = Entry{Kind: JTI, Value: v, Since: c.t, Until: c.t.Add(time.Hour)}
	}
	if _, err := s.Revoke(JTI, "one more", 0, "", ""); !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	if _, err := s.Revoke(JTI, "t-5", 0, "again", ""); err != nil {
		t.Fatalf("replacing one in a full list: %v", err)
	}
	if got, _ := open(t, dir, c).List(); len(got) != MaxEntries {
		t.Fatalf("%d entries", len(got))
	}
	c.t = c.t.Add(time.Hour)
	if _, err := s.Revoke(JTI, "one more", 0, "", ""); err != nil {
		t.Fatalf("after the others' time: %v", err)
	}
}

func TestDamagedFileStopsTheStart(t *testing.T) {
	dir, c := t.TempDir(), newClock()
	s := open(t, dir, c)
	if _, err := s.Revoke(Identity, id, 0, "", ""); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, fileName)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	version, err := encode(document{Version: 99})
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"empty":           {},
		"cut":             good[:len(good)-1],
		"one bit":         append(append([]byte{}, good[:len(good)-9]...), append([]byte{good[len(good)-9] ^ 1}, good[len(good)-8:]...)...),
		"another version": version,
	} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, c.now); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUnwritableListChangesNothing(t *testing.T) {
	dir, c := t.TempDir(), newClock()
	s := open(t, dir, c)
	if _, err := s.Revoke(JTI, "kept", 0, "", ""); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Revoke(JTI, "lost", 0, "", ""); err == nil {
		t.Fatal("a revocation that is not on disk was answered")
	}
	if err := s.Lift(JTI, "kept"); err == nil {
		t.Fatal("lifted, but not on disk")
	}
	if got, gen := s.List(); len(got) != 1 || got[0].Value != "kept" || gen != 1 {
		t.Fatalf("got %v, generation %d", got, gen)
	}
}

// TestKilledWriter kills a process with SIGKILL while it revokes, and expects
// every revocation that it was told of to hold.
func TestKilledWriter(t *testing.T) {
	if dir := os.Getenv("REVOCATIONS_DIR"); dir != "" {
		s, err := Open(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; ; i++ {
			if _, err := s.Revoke(JTI, fmt.Sprint("t-", i), 0, "", ""); err != nil {
				t.Fatal(err)
			}
			fmt.Println("answered", i)
		}
	}
	dir := t.TempDir()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestKilledWriter$", "-test.v")
	cmd.Env = append(os.Environ(), "REVOCATIONS_DIR="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	last := -1
	var line string
	for last < 20 {
		if _, err := fmt.Fscanln(out, &line, &last); err != nil && line == "" {
			t.Fatal(err)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	got, _ := open(t, dir, &clock{time.Now()}).List()
	if len(got) <= last {
		t.Fatalf("%d revocations hold, %d were answered", len(got), last+1)
	}
}

// TestConcurrentUse: changes are told one after the other, and none is lost.
func TestConcurrentUse(t *testing.T) {
	s := open(t, t.TempDir(), newClock())
	var last uint64
	s.OnChange(func(_ []Entry, generation uint64) {
		if generation != 0 && generation != last+1 {
			t.Errorf("generation %d after %d", generation, last)
		}
		last = generation
	})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 20 {
				v := fmt.Sprint(g, "-", i)
				if _, err := s.Revoke(JTI, v, 0, "", ""); err != nil {
					t.Error(err)
				}
				s.List()
				if i%2 == 0 {
					if err := s.Lift(JTI, v); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if got, gen := s.List(); len(got) != 40 || gen != 120 || last != 120 {
		t.Errorf("%d entries, generation %d, told of %d", len(got), gen, last)
	}
}

func FuzzDecode(f *testing.F) {
	good, err := encode(document{fileVersion, 1, []Entry{{Kind: JTI, Value: "x", Since: newClock().t}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte("{}"))
	f.Add([]byte("\n{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := decode(b)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatal(err)
			}
			return
		}
		if _, err := encode(d); err != nil {
			t.Fatal(err)
		}
	})
}
