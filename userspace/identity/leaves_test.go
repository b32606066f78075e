// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const otherID = "spiffe://td/b"

func signWith(ca *CA, ttl time.Duration) SignFunc {
	return func(_ context.Context, id string, csr []byte) ([][]byte, error) { return ca.Sign(csr, id, ttl) }
}

func newLeaves(t testing.TB, sign SignFunc, ids ...string) *Leaves {
	t.Helper()
	l := NewLeaves(LeavesOptions{Sign: sign})
	t.Cleanup(l.Close)
	if err := l.Set(ids); err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLeavesRotate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := openCA(t, CAOptions{StateDir: t.TempDir()})
		var fails, signed atomic.Int32
		l := newLeaves(t, func(ctx context.Context, id string, csr []byte) ([][]byte, error) {
			if fails.Load() > 0 {
				return nil, errors.New("the agent is away")
			}
			signed.Add(1)
			return ca.Sign(csr, id, 10*time.Minute)
		}, testID)
		first, err := l.Wait(t.Context(), testID)
		if err != nil {
			t.Fatal(err)
		}
		if first.ID != testID || first.Certificate.Leaf == nil || len(first.Certificate.Certificate) != 1 {
			t.Errorf("%+v", first)
		}
		if named, err := l.ByServerName(ServerName(testID)); err != nil || named != first {
			t.Errorf("by server name: %v, %v", named, err)
		}
		changed, _ := l.Changed(testID)
		time.Sleep(3*time.Minute + 59*time.Second)
		if leaf, err := l.Get(testID); err != nil || leaf != first {
			t.Errorf("after two fifths: %v", err)
		}
		time.Sleep(2*time.Minute + 2*time.Second)
		synctest.Wait()
		select {
		case <-changed:
		default:
			t.Error("nobody was told of the rotation")
		}
		second, err := l.Get(testID)
		if err != nil || second == first || second.Thumbprint == first.Thumbprint || second.Serial == first.Serial {
			t.Fatalf("after three fifths: %v, the same leaf", err)
		}
		// A token that is bound to the first is good as long as it lives.
		if p := l.Thumbprints(testID); !slices.Equal(p, [][32]byte{first.Thumbprint, second.Thumbprint}) {
			t.Errorf("%d thumbprints, want both", len(p))
		}
		if n := testing.AllocsPerRun(10, func() { l.Thumbprints(testID); _, _ = l.Get(testID) }); n != 0 {
			t.Errorf("%v allocations a read", n)
		}

		// The agent is away: the second serves to its end and no longer.
		fails.Store(1)
		time.Sleep(time.Until(first.NotAfter) + time.Second)
		if p := l.Thumbprints(testID); !slices.Equal(p, [][32]byte{second.Thumbprint}) {
			t.Errorf("%d thumbprints after the first ended, want one", len(p))
		}
		time.Sleep(time.Until(second.NotAfter) - time.Second)
		if leaf, err := l.Get(testID); err != nil || leaf != second {
			t.Errorf("to its end: %v", err)
		}
		if s := l.Status(); len(s) != 1 || s[0].Serial != second.Serial || !strings.Contains(s[0].Error, "the agent is away") {
			t.Errorf("%+v", s)
		}
		time.Sleep(2 * time.Second)
		if _, err := l.Get(testID); !errors.Is(err, ErrNoLeaf) || errors.Is(err, ErrUnsigned) || !strings.Contains(err.Error(), "the agent is away") {
			t.Errorf("after its end: %v; want ErrNoLeaf with the cause", err)
		}
		if p := l.Thumbprints(testID); len(p) != 0 {
			t.Errorf("%d thumbprints after the end", len(p))
		}
		fails.Store(0)
		if _, err := l.Wait(t.Context(), testID); err != nil {
			t.Errorf("after the agent came back: %v", err)
		}
		if s := l.Status(); s[0].Error != "" {
			t.Errorf("%+v", s)
		}

		// What is no longer held is neither served nor renewed.
		if err := l.Set([]string{otherID}); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Wait(t.Context(), testID); !errors.Is(err, ErrNoLeaf) {
			t.Errorf("dropped identity: %v", err)
		}
		if p := l.Thumbprints(testID); p != nil {
			t.Errorf("dropped identity: %d thumbprints", len(p))
		}
		synctest.Wait()
		before := signed.Load()
		time.Sleep(7 * time.Minute)
		synctest.Wait()
		if n := signed.Load() - before; n != 1 {
			t.Errorf("%d signatures in 7 minutes for one identity, want 1", n)
		}
		l.Close()
		time.Sleep(time.Hour)
		if signed.Load() != before+1 {
			t.Error("signed after Close")
		}
		if err := l.Set([]string{testID}); err == nil {
			t.Error("Set after Close")
		}
	})
}

func TestLeavesKeepWhatIsHeld(t *testing.T) {
	ca := openCA(t, CAOptions{StateDir: t.TempDir()})
	l := newLeaves(t, signWith(ca, 0), testID)
	first, err := l.Wait(t.Context(), testID)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Set([]string{otherID, testID, testID}); err != nil {
		t.Fatal(err)
	}
	if leaf, err := l.Get(testID); err != nil || leaf != first {
		t.Errorf("%v; the leaf changed", err)
	}
	if err := l.Set([]string{"spiffe://td/x/"}); err == nil {
		t.Error("a bad ID was taken")
	}
	if leaf, err := l.Get(testID); err != nil || leaf != first {
		t.Errorf("after a refused Set: %v", err)
	}
	if err := l.Set(make([]string, MaxLeaves+1)); err == nil {
		t.Error("too many were taken")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Wait(ctx, "spiffe://td/never"); !errors.Is(err, ErrNoLeaf) || errors.Is(err, ErrUnsigned) {
		t.Errorf("%v", err)
	}
}

// As long as the signer has not answered, the first leaf may still come.
func TestUnsigned(t *testing.T) {
	l := newLeaves(t, func(ctx context.Context, _ string, _ []byte) ([][]byte, error) { <-ctx.Done(); return nil, ctx.Err() }, testID)
	if _, err := l.Get(testID); !errors.Is(err, ErrNoLeaf) || !errors.Is(err, ErrUnsigned) {
		t.Errorf("%v; want ErrUnsigned", err)
	}
}

// A wrong answer of the signer is not served.
func TestLeavesCheckTheAnswer(t *testing.T) {
	type ask struct {
		t       *testing.T
		ca, old *CA
		id      string
		csr     []byte
	}
	for name, c := range map[string]struct {
		sign func(ask) ([][]byte, error)
		want string
	}{
		"empty":       {func(ask) ([][]byte, error) { return nil, nil }, "no certificate"},
		"not DER":     {func(ask) ([][]byte, error) { return [][]byte{{1}}, nil }, "take leaf"},
		"another id":  {func(a ask) ([][]byte, error) { return a.ca.Sign(a.csr, otherID, 0) }, "it names"},
		"another key": {func(a ask) ([][]byte, error) { return a.ca.Sign(csrOf(a.t, newKey(a.t)), a.id, 0) }, "another key"},
		"expired":     {func(a ask) ([][]byte, error) { return a.old.Sign(a.csr, a.id, 0) }, "it ended"},
		"long":        {func(ask) ([][]byte, error) { return make([][]byte, 9), nil }, "chain of 9"},
		"refused":     {func(ask) ([][]byte, error) { return nil, errors.New("the plan forbids it") }, "the plan forbids it"},
	} {
		synctest.Test(t, func(t *testing.T) {
			ca := openCA(t, CAOptions{StateDir: t.TempDir()})
			old := openCA(t, CAOptions{StateDir: t.TempDir(), Now: func() time.Time { return time.Now().Add(-time.Hour) }})
			l := newLeaves(t, func(_ context.Context, id string, csr []byte) ([][]byte, error) {
				return c.sign(ask{t, ca, old, id, csr})
			}, testID)
			synctest.Wait()
			if _, err := l.Get(testID); !errors.Is(err, ErrNoLeaf) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v; want %q", name, err, c.want)
			}
		})
	}
}

// Many identities are signed a few at a time, and Close waits for none that
// hangs.
func TestLeavesBoundTheSigner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ids := make([]string, 100)
		for i := range ids {
			ids[i] = fmt.Sprintf("spiffe://td/%d", i)
		}
		var now, most atomic.Int32
		l := NewLeaves(LeavesOptions{Sign: func(ctx context.Context, _ string, _ []byte) ([][]byte, error) {
			most.Store(max(most.Load(), now.Add(1)))
			defer now.Add(-1)
			<-ctx.Done()
			return nil, ctx.Err()
		}})
		if err := l.Set(ids); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := now.Load(); n != signers {
			t.Errorf("%d at once, want %d", n, signers)
		}
		time.Sleep(2 * leafSignTime)
		if n := most.Load(); n != signers {
			t.Errorf("%d at once, want %d", n, signers)
		}
		l.Close()
		if n := now.Load(); n != 0 {
			t.Errorf("%d still run after Close", n)
		}
	})
}

func TestThumbprintsAreBounded(t *testing.T) {
	p := (*prints)(nil).live(testNow)
	for i := range 3 * maxThumbprint {
		p.add([32]byte{byte(i)}, testNow.Add(time.Hour))
	}
	if len(p.list) != maxThumbprint || p.list[maxThumbprint-1] != [32]byte{3*maxThumbprint - 1} {
		t.Errorf("%d kept, the last is %v", len(p.list), p.list[len(p.list)-1][0])
	}
}

func TestServerName(t *testing.T) {
	if a, b := ServerName(testID), ServerName(otherID); a == b || len(a) > 63+len(".id.sallyport") || strings.Trim(a, "0123456789abcdef") != ".id.sallyport" {
		t.Errorf("%q, %q", a, b)
	}
}

func BenchmarkLeavesGet(b *testing.B) {
	ca := openCA(b, CAOptions{StateDir: b.TempDir()})
	l := newLeaves(b, signWith(ca, 0), testID)
	if _, err := l.Wait(b.Context(), testID); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := l.Get(testID); err != nil {
			b.Fatal(err)
		}
		l.Thumbprints(testID)
	}
}
