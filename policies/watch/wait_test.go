// SPDX-License-Identifier: Apache-2.0

package watch

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// waiting starts a wait of a watcher with a debounce of a second, in a bubble
// with its own clock.
func waiting(ctx context.Context) (n *notifier, returned chan bool) {
	w := New(Options{Debounce: time.Second, Logger: slog.New(slog.DiscardHandler)})
	n = &notifier{changes: make(chan struct{}, 1), writing: map[string]struct{}{}}
	returned = make(chan bool, 1)
	go func() { returned <- w.wait(ctx, n, time.Hour) }()
	return n, returned
}

// after waits for the end of a wait and says how long it took.
func after(t *testing.T, start time.Time, returned chan bool) time.Duration {
	t.Helper()
	if !<-returned {
		t.Error("the folder is not read")
	}
	return time.Since(start)
}

func TestDebounce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		n, returned := waiting(t.Context())
		for range 5 { // each within the debounce of the one before
			time.Sleep(900 * time.Millisecond)
			n.changes <- struct{}{}
		}
		if d := after(t, start, returned); d != 5*900*time.Millisecond+time.Second {
			t.Errorf("read after %s, not a second after the last change", d)
		}
	})
}

func TestNeverQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		n, returned := waiting(t.Context())
		stop := make(chan struct{})
		go func() {
			for {
				select {
				case n.changes <- struct{}{}:
				default:
				}
				select {
				case <-stop:
					return
				case <-time.After(100 * time.Millisecond):
				}
			}
		}()
		if d := after(t, start, returned); d < 9*time.Second || d > 11*time.Second {
			t.Errorf("read after %s", d)
		}
		close(stop)
	})
}

func TestHalfWrittenIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		n, returned := waiting(t.Context())
		n.writing["a.yaml"] = struct{}{}
		n.changes <- struct{}{}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(returned) != 0 {
			t.Fatal("read while a file was being written")
		}
		n.mu.Lock()
		clear(n.writing)
		n.mu.Unlock()
		n.changes <- struct{}{}
		if d := after(t, start, returned); d != time.Minute+time.Second {
			t.Errorf("read after %s", d)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		n, returned := waiting(t.Context())
		n.writing["a.yaml"] = struct{}{}
		n.changes <- struct{}{}
		if d := after(t, start, returned); d != 100*time.Second {
			t.Errorf("a file that stays open for writing is read after %s", d)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		n, returned := waiting(ctx)
		n.writing["a.yaml"] = struct{}{}
		n.changes <- struct{}{}
		synctest.Wait()
		cancel()
		if <-returned {
			t.Error("the folder is read although the watcher was stopped")
		}
	})
}

// TestWritingIsSeen holds what the kernel tells of real files against what is
// made of it.
func TestWritingIsSeen(t *testing.T) {
	dir := t.TempDir()
	n := newNotifier(dir, slog.New(slog.DiscardHandler))
	defer n.close()
	if there, _ := n.watch(); !there || n.file == nil {
		t.Skip("no inotify here")
	}
	until := func(what string, want ...string) {
		t.Helper()
		deadline := time.After(10 * time.Second)
		for {
			n.mu.Lock()
			var got []string
			for name := range n.writing {
				got = append(got, name)
			}
			n.mu.Unlock()
			if slices.Sort(got); slices.Equal(got, want) {
				return
			}
			select {
			case <-n.changes:
			case <-deadline:
				t.Fatalf("%s: being written %v, want %v", what, got, want)
			}
		}
	}
	open := func(name string) *os.File {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	write := func(f *os.File, text string) {
		t.Helper()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	a, b := open("a.yaml"), open("b.yaml")
	write(a, "half")
	until("a written", "a.yaml")
	write(b, "half")
	until("both written", "a.yaml", "b.yaml")
	a.Close()
	until("a closed", "b.yaml")
	if err := os.Rename(filepath.Join(dir, "b.yaml"), filepath.Join(dir, "c.yaml")); err != nil {
		t.Fatal(err)
	}
	until("b renamed")
	b.Close()
	c := open("c.yaml") // truncates
	until("c truncated", "c.yaml")
	if err := os.Remove(filepath.Join(dir, "c.yaml")); err != nil {
		t.Fatal(err)
	}
	until("c removed")
	c.Close()
}

// FuzzFollow holds that no bytes of a notification break the reader.
func FuzzFollow(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 'a', 0, 0, 0})
	f.Add([]byte{1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		n := &notifier{writing: map[string]struct{}{}}
		n.follow(b)
		if len(n.writing) > maxWriting {
			t.Error(len(n.writing))
		}
	})
}
