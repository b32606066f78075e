// SPDX-License-Identifier: Apache-2.0

// Package statefile keeps small secret files in a state directory: written
// as a whole or not at all, readable by their owner alone, bounded in size,
// and changed by one process at a time.
package statefile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// MakeDir makes a directory of mode 0700, with its parents, and refuses one
// that group or others may write to.
func MakeDir(path string) error {
	if found, err := Exists(path); err != nil {
		return err
	} else if !found {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
		if err := giveToOwner(path, filepath.Dir(path)); err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return fmt.Errorf("open state directory: %w", err)
	case !info.IsDir():
		return fmt.Errorf("open state directory %s: not a directory", path)
	case info.Mode()&0o022 != 0:
		return fmt.Errorf("open state directory %s: group or others may write to it (mode %v); chmod go-w it", path, info.Mode().Perm())
	}
	return nil
}

// Write replaces path by way of a synced neighbour, so that a crash leaves
// the old file or the new one. The file has mode 0600 and, when root writes
// it, the owner of its directory: a command run by root must not lock the
// server out of its own state.
func Write(path string, b []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err == nil {
		err = giveToOwner(f.Name(), dir)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return err
	}
	return SyncDir(dir)
}

// SyncDir makes renames and removals in a directory outlive a power cut.
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// giveToOwner only has an effect for root.
func giveToOwner(path, dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Uid == 0 {
		return nil
	}
	return os.Lchown(path, int(st.Uid), int(st.Gid))
}

// Read reads a file of at most limit bytes.
func Read(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // of a pipe it would wait for a writer
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return b, nil
}

// CheckPrivate refuses a file that others could have read or written.
func CheckPrivate(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("open %s: not a regular file", path)
	}
	if info.Mode()&0o077 != 0 {
		return fmt.Errorf("open %s: group or others may use it (mode %v); chmod 600 it, and replace it if it may have been read", path, info.Mode().Perm())
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && os.Geteuid() != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("open %s: it belongs to uid %d, not to this process or root", path, st.Uid)
	}
	return nil
}

// Exists says whether there is something at path.
func Exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	}
	return false, fmt.Errorf("look for %s: %w", path, err)
}

// holdWait is how long a process that is just ending may keep a file.
const holdWait = 2 * time.Second

// Hold opens a file of mode 0600, made where there is none, as this process's
// own until it is closed. Another process that has it is waited for a little,
// as it may be ending.
func Hold(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, holdWait)
	defer cancel()
	for {
		if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err == nil {
			return f, nil
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("another process has it open: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Lock waits until no other holder, of this process or another, has the lock
// file. It is meant for moments: a command and a server that change the same
// directory.
func Lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	if err = giveToOwner(path, filepath.Dir(path)); err == nil {
		for {
			if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX); !errors.Is(err, syscall.EINTR) {
				break
			}
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}
