// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxExecutable bounds the bytes of a file that is hashed.
	maxExecutable = 1 << 30
	// maxDigests bounds the files whose digests are known, being hashed among
	// them; maxHashing those that wait or are hashed, and hashers those that
	// are read at a time.
	maxDigests = 4096
	maxHashing = 64
	hashers    = 2
	// rest is how old the last change of a file must be before it is hashed:
	// two changes within one tick of the kernel's clock bear one time, so that
	// the second would not be seen.
	rest = time.Second
)

var (
	errHashing = errors.New("not known yet: it is being hashed")
	errBusy    = errors.New("not known yet: too much is being hashed")
	errLarge   = errors.New("the executable is larger than 1 GiB")
	errForeign = errors.New("the executable is in a mount namespace of other users than the node's, whose file systems are theirs")
)

// content stands for what is in a file: whatever is written to it changes its
// ctime, which nobody can set.
type content struct {
	major, minor uint32
	inode        uint64
	size         uint64
	mtime, ctime unix.StatxTimestamp
}

// digests knows the SHA-256 of executables. Reading takes as long as it takes,
// so it is done beside the scans: until then a file has no digest.
type digests struct {
	done  func() // called when a digest has become known
	slots chan struct{}
	stop  context.Context
	close context.CancelFunc // ends what is being hashed; nothing is after it

	mu      sync.Mutex
	known   map[content]*digest
	hashing int
	asked   uint64
}

// digest is that of one content.
type digest struct {
	sum  string // sha256: and 64 digits, "" while it is not known
	busy bool   // it is being hashed
	err  error  // why that failed the last time
	used uint64 // when it was asked for last, in questions
}

func newDigests(done func()) *digests {
	d := &digests{done: done, slots: make(chan struct{}, hashers), known: map[content]*digest{}}
	d.stop, d.close = context.WithCancel(context.Background())
	return d
}

// of returns the digest of an open executable, if it is known. If not it will
// be.
func (d *digests) of(exe *program) (string, error) {
	if exe.state.size > maxExecutable {
		return "", errLarge
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked++
	k := d.known[exe.state]
	switch {
	case k != nil && k.sum != "":
		k.used = d.asked
		return k.sum, nil
	case k != nil && k.busy:
		return "", cmp.Or(k.err, errHashing)
	case d.hashing >= maxHashing || d.stop.Err() != nil:
		return "", errBusy
	case k == nil:
		d.forget()
		k = &digest{}
		d.known[exe.state] = k
	}
	// The worker has a descriptor of its own: the file is the one that was
	// looked at, whatever is at its path by then.
	fd, err := unix.FcntlInt(uintptr(exe.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("cannot be read: %w", err)
	}
	k.used, k.busy = d.asked, true
	d.hashing++
	go d.hash(fd, exe.state, k) // not waited for at the end: a disk may never answer
	return "", cmp.Or(k.err, errHashing)
}

// busy says whether something is being hashed.
func (d *digests) busy() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hashing > 0
}

// forget makes room for one more: what was asked for least recently goes.
func (d *digests) forget() {
	if len(d.known) < maxDigests {
		return
	}
	var oldest content
	var last *digest
	for c, k := range d.known {
		if !k.busy && (last == nil || k.used < last.used) {
			oldest, last = c, k
		}
	}
	delete(d.known, oldest)
}

// hash makes a content's digest known. Where that fails, the next scan that
// finds it running has it tried again.
func (d *digests) hash(fd int, c content, k *digest) {
	sum, err := d.read(fd, c)
	unix.Close(fd) //nolint:errcheck // only looked at
	d.mu.Lock()
	d.hashing--
	k.sum, k.busy, k.err = sum, false, err
	d.mu.Unlock()
	if err == nil {
		d.done()
	}
}

// read hashes a file once it has rested and there is a slot.
func (d *digests) read(fd int, c content) (string, error) {
	if age := time.Since(time.Unix(c.ctime.Sec, int64(c.ctime.Nsec))); 0 <= age && age < rest {
		select {
		case <-d.stop.Done():
			return "", d.stop.Err()
		case <-time.After(rest - age):
		}
	}
	select {
	case <-d.stop.Done():
		return "", d.stop.Err()
	case d.slots <- struct{}{}:
	}
	defer func() { <-d.slots }()
	f, err := os.Open(ownFile(fd))
	if err != nil {
		return "", fmt.Errorf("cannot be read: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	// One byte more than there should be tells that there is more.
	n, err := io.CopyBuffer(h, io.LimitReader(reader{d.stop, f}, int64(c.size)+1), make([]byte, 256<<10))
	if err != nil {
		return "", fmt.Errorf("cannot be read: %w", err)
	}
	if after, _, err := stateOf(fd); err != nil || after != c || uint64(n) != c.size {
		return "", errors.New("the executable changed while it was read")
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), nil
}

// reader ends with a context.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r reader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(b)
}

// program is the executable that a process runs: the open file itself, which
// stays the same whatever happens to its path. It is opened by O_PATH and asked
// nothing that its file system would have to answer: that may be the workload's
// own, which must not hold up a scan.
type program struct {
	fd    int
	path  string // in the process's mount namespace, with " (deleted)" where it was removed
	state content
	mount uint64 // number of the mount that it is on
}

// openProgram opens what a process runs now; close closes it.
func openProgram(pid int) (*program, error) {
	fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/exe", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	p := &program{fd: fd}
	if p.path, err = os.Readlink(ownFile(fd)); err == nil {
		p.state, p.mount, err = stateOf(fd)
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *program) close() { unix.Close(p.fd) } //nolint:errcheck // only looked at

func ownFile(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// stateOf returns what an open file's content is now, by what the kernel knows
// of it without asking anyone, and on which mount it is (Linux 5.8).
func stateOf(fd int) (content, uint64, error) {
	const want = unix.STATX_BASIC_STATS | unix.STATX_MNT_ID
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, want, &st); err != nil {
		return content{}, 0, err
	}
	if st.Mask&want != want || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return content{}, 0, errors.New("not a file whose state is known")
	}
	return content{major: st.Dev_major, minor: st.Dev_minor, inode: st.Ino, size: st.Size, mtime: st.Mtime, ctime: st.Ctime}, st.Mnt_id, nil
}

// local are the file systems of which the kernel itself keeps the content and
// its times. What a process or another machine serves (FUSE, NFS, 9p) can be one
// thing to who hashes it and another to who runs it.
var local = []string{
	"bcachefs", "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "iso9660", "overlay", "ramfs", "rootfs", "squashfs", "tmpfs", "xfs", "zfs",
}

// mounts are the mount namespaces that were looked at in one scan, by the
// kernel's name for them: the type of each mount, by its number, and nil for
// one that the node's own users did not make.
type mounts map[string]map[uint64]string

// vouch says why the kernel does not vouch for what the process's executable
// holds, nil where it does. It is asked in each scan: numbers of devices are
// given again, and a file system that is the workload's own says of a file what
// it likes.
func (m mounts) vouch(pid int, exe *program) error {
	ns, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/mnt")
	if err != nil {
		return fmt.Errorf("cannot be read: %w", err)
	}
	types, seen := m[ns]
	if !seen {
		if types, err = mountsOf(pid); err != nil {
			return fmt.Errorf("cannot be read: %w", err)
		}
		m[ns] = types
	}
	switch kind, mounted := types[exe.mount]; {
	case types == nil:
		return errForeign
	case !mounted:
		return errors.New("the executable is on no file system that is mounted where it runs")
	case !slices.Contains(local, kind):
		return fmt.Errorf("the executable is on %s, whose content the kernel does not vouch for", kind)
	}
	return nil
}

// mountsOf reads the mounts of a process's namespace, nil where a user
// namespace other than the agent's owns it.
func mountsOf(pid int) (map[uint64]string, error) {
	proc := "/proc/" + strconv.Itoa(pid)
	ns, err := os.Open(proc + "/ns/mnt")
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	owner, err := unix.IoctlRetInt(int(ns.Fd()), unix.NS_GET_USERNS)
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			return nil, nil // one outside of the agent's
		}
		return nil, err
	}
	defer unix.Close(owner) //nolint:errcheck // only looked at
	var theirs, mine unix.Stat_t
	if err := errors.Join(unix.Fstat(owner, &theirs), unix.Stat("/proc/self/ns/user", &mine)); err != nil {
		return nil, err
	}
	if theirs.Ino != mine.Ino {
		return nil, nil
	}
	f, err := os.Open(proc + "/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return mountTypes(f)
}

// mountTypes reads mountinfo (proc(5)): the mount's number is the first field,
// its type the first one after the dash.
func mountTypes(r io.Reader) (map[uint64]string, error) {
	types := map[uint64]string{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20) // options of overlays are long
	for lines.Scan() {
		before, after, _ := strings.Cut(lines.Text(), " - ")
		number, _, _ := strings.Cut(before, " ")
		kind, _, _ := strings.Cut(after, " ")
		if n, err := strconv.ParseUint(number, 10, 64); err == nil && kind != "" {
			types[n] = kind
		}
	}
	return types, lines.Err()
}
