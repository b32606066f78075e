// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxExecutable bounds an executable whose content is looked at, in bytes.
	maxExecutable = 1 << 30
	maxDigests    = 4096 // that are kept
	// hashers is how many executables are read at once: a file system that
	// does not answer holds up as many.
	hashers = 4
	queued  = 1024 // executables that wait
	// digestPause is the least time between two readings of one inode, and
	// digestShare how many times as long as the last one took: who changes it
	// all the time must not have it read all the time.
	digestPause = 500 * time.Millisecond
	digestShare = 10
)

// inode is a file.
type inode struct {
	major, minor uint32
	number       uint64
}

// file is a file's content as its inode tells it: who writes to it changes one
// of these, the time of change at least.
type file struct {
	inode
	size         uint64
	mtime, ctime unix.StatxTimestamp
}

// digest is what is known of one file, as it was at a time.
type digest struct {
	of   file
	sum  [sha256.Size]byte
	err  error
	next time.Time // when it may be read again, if it has changed
	used uint64    // the last look-up
}

// job is an executable to be read.
type job struct {
	f   file
	pid int
}

// digests knows the content of executables. They are read by goroutines of
// their own: nothing else waits for a file system.
type digests struct {
	wake func() // something new is known
	jobs chan job

	mu      sync.Mutex
	known   map[inode]*digest
	waiting map[inode]bool
	looked  uint64 // look-ups
}

func newDigests(wake func()) *digests {
	return &digests{wake: wake, jobs: make(chan job, queued), known: map[inode]*digest{}, waiting: map[inode]bool{}}
}

// run reads executables until ctx ends.
func (d *digests) run(ctx context.Context) {
	for range hashers {
		go func() {
			for {
				select {
				case j := <-d.jobs:
					began := time.Now()
					sum, err := hash(ctx, j)
					if ctx.Err() == nil {
						d.learn(j.f, sum, err, time.Since(began))
					}
				case <-ctx.Done():
					return
				}
			}
		}()
	}
}

var (
	errUnknownYet = errors.New("not known yet")
	errTooLarge   = fmt.Errorf("larger than %d MiB", maxExecutable>>20)
	errChanged    = errors.New("changed while it was read")
	errQueue      = errors.New("too many executables wait to be read")
)

// of returns the SHA-256 of the executable of a process, or why it is not
// known; errUnknownYet where it will be.
func (d *digests) of(pid int) ([sha256.Size]byte, error) {
	f, err := statx(unix.AT_FDCWD, executable(pid), unix.AT_STATX_DONT_SYNC)
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.looked++
	k := d.known[f.inode]
	if k != nil {
		k.used = d.looked
	}
	switch {
	case k != nil && k.of == f:
		return k.sum, k.err
	case d.waiting[f.inode], k != nil && time.Now().Before(k.next):
		return [sha256.Size]byte{}, errUnknownYet
	}
	select {
	case d.jobs <- job{f, pid}:
		d.waiting[f.inode] = true
		return [sha256.Size]byte{}, errUnknownYet
	default:
		return [sha256.Size]byte{}, errQueue
	}
}

// learn keeps what was read, in place of what was looked up longest ago. It is
// looked at again when it may be read again.
func (d *digests) learn(f file, sum [sha256.Size]byte, err error, took time.Duration) {
	d.mu.Lock()
	delete(d.waiting, f.inode)
	if d.known[f.inode] == nil && len(d.known) >= maxDigests {
		var oldest inode
		least := ^uint64(0)
		for k, v := range d.known {
			if v.used < least {
				oldest, least = k, v.used
			}
		}
		delete(d.known, oldest)
	}
	d.looked++
	if errors.Is(err, errChanged) {
		f = file{inode: f.inode} // as no file is
	}
	pause := max(digestPause, digestShare*took)
	d.known[f.inode] = &digest{of: f, sum: sum, err: err, next: time.Now().Add(pause), used: d.looked}
	d.mu.Unlock()
	d.wake()
	time.AfterFunc(pause, d.wake)
}

// hash reads the executable of a process, if it is still that file.
func hash(ctx context.Context, j job) (sum [sha256.Size]byte, err error) {
	if j.f.size > maxExecutable {
		return sum, errTooLarge
	}
	in, err := os.Open(executable(j.pid))
	if err != nil {
		return sum, err
	}
	defer in.Close() //nolint:errcheck // it was read
	same := func() error {
		f, err := statx(int(in.Fd()), "", unix.AT_EMPTY_PATH)
		if err == nil && f != j.f {
			err = errChanged
		}
		return err
	}
	if err := same(); err != nil {
		return sum, err
	}
	h := sha256.New()
	buf := make([]byte, 256<<10)
	for left := int64(maxExecutable); ; {
		n, err := in.Read(buf)
		h.Write(buf[:n])
		if left -= int64(n); left < 0 {
			return sum, errTooLarge
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err = errors.Join(err, ctx.Err()); err != nil {
			return sum, err
		}
	}
	h.Sum(sum[:0])
	return sum, same()
}

// executable is the magic link to what a process runs, also where that was
// renamed or unlinked (proc(5)).
func executable(pid int) string { return "/proc/" + strconv.Itoa(pid) + "/exe" }

func statx(dir int, name string, flags int) (f file, err error) {
	var st unix.Statx_t
	const want = unix.STATX_INO | unix.STATX_SIZE | unix.STATX_MTIME | unix.STATX_CTIME
	if err := unix.Statx(dir, name, flags, want, &st); err != nil {
		return f, err
	}
	return file{inode{st.Dev_major, st.Dev_minor, st.Ino}, st.Size, st.Mtime, st.Ctime}, nil
}
