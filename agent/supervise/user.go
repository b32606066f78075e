// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// User is who the userspace process runs as; never root.
type User struct {
	Name     string
	UID, GID uint32
}

// alone is the user and group where there is no user sallyport: a number that
// neither distributions nor systemd give out (65520 to 65533 are left free).
// nobody would not do: whatever else runs as nobody could change the relation
// store and end the process.
const alone = 65527

// overflow is nobody, as which all kinds of programs run.
const overflow = 65534

// LookupUser finds a user by name or number in passwd (/etc/passwd). "auto" is
// sallyport where there is one, else a number that nobody else has: a number
// without an entry is its own group. Users that others share are refused.
func LookupUser(passwd, name string) (User, error) {
	if name == "auto" {
		u, ok, err := find(passwd, func(n string, _ uint32) bool { return n == "sallyport" })
		if err != nil || ok {
			return u, errors.Join(err, notRoot(u, err))
		}
		if u, ok, err := find(passwd, func(_ string, uid uint32) bool { return uid == alone }); err != nil || ok {
			return User{}, errors.Join(err, fmt.Errorf("find a user for userspace: number %d is %s's; make one: useradd -r sallyport", alone, u.Name))
		}
		return User{strconv.Itoa(alone), alone, alone}, nil
	}
	number, numErr := strconv.ParseUint(name, 10, 31)
	u, ok, err := find(passwd, func(n string, uid uint32) bool {
		return n == name || numErr == nil && uint64(uid) == number
	})
	if err != nil {
		return User{}, err
	}
	if !ok {
		if numErr != nil {
			return User{}, fmt.Errorf("find user %s for userspace: there is none; set userspace.user, or make it: useradd -r %s", name, name)
		}
		u = User{name, uint32(number), uint32(number)}
	}
	return u, notRoot(u, nil)
}

func notRoot(u User, err error) error {
	if err == nil && (u.UID == 0 || u.GID == 0) {
		return fmt.Errorf("use %s for userspace: it is root, or in root's group", u.Name)
	}
	if err == nil && u.UID == overflow {
		return fmt.Errorf("use %s for userspace: other programs run as it too; make a user of its own: useradd -r sallyport", u.Name)
	}
	return nil
}

// find reads passwd itself: os/user may ask a directory service.
func find(passwd string, match func(name string, uid uint32) bool) (User, bool, error) {
	f, err := os.Open(passwd)
	if errors.Is(err, fs.ErrNotExist) {
		return User{}, false, nil
	}
	if err != nil {
		return User{}, false, fmt.Errorf("find user for userspace: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), ":")
		if len(fields) < 4 {
			continue
		}
		uid, err1 := strconv.ParseUint(fields[2], 10, 31)
		gid, err2 := strconv.ParseUint(fields[3], 10, 31)
		if err1 == nil && err2 == nil && match(fields[0], uint32(uid)) {
			return User{fields[0], uint32(uid), uint32(gid)}, true, nil
		}
	}
	if err := lines.Err(); err != nil {
		return User{}, false, fmt.Errorf("find user for userspace: %w", err)
	}
	return User{}, false, nil
}

// maxInherited bounds the files that are handed over.
const maxInherited = 1024

// PrepareDir makes dir, the one folder that the user may write, closed to
// everybody else. What another user of userspace left there is handed over. Its
// parent, which is the agent's, is opened for passing through (mode 0711): what
// the agent keeps there must each be closed itself.
func (u User) PrepareDir(dir string) error {
	parent := filepath.Dir(dir)
	if err := os.MkdirAll(parent, 0o711); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	if st, err := os.Stat(parent); err == nil && st.Mode().Perm()&0o001 == 0 {
		if err := os.Chmod(parent, st.Mode().Perm()|0o011); err != nil {
			return fmt.Errorf("open state directory for passing through: %w", err)
		}
	}
	for d := filepath.Dir(parent); d != "/"; d = filepath.Dir(d) {
		if st, err := os.Stat(d); err == nil && st.Mode().Perm()&0o001 == 0 {
			return fmt.Errorf("make state directory of userspace %s: %s is closed to user %s; set stateDir to another place", dir, d, u.Name)
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make state directory of userspace: %w", err)
	}
	d, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("open state directory of userspace: %w", err)
	}
	defer d.Close()
	if err := u.inherit(d); err != nil {
		return fmt.Errorf("hand over state of userspace: %w", err)
	}
	if err := errors.Join(d.Chown(int(u.UID), int(u.GID)), d.Chmod(0o700)); err != nil {
		return fmt.Errorf("hand over state directory of userspace: %w", err)
	}
	return nil
}

// inherit hands the files of a folder over that its owner, who was the user
// before, has there. That user may have put anything there: nothing but plain
// files of its own, which no other folder has too, change hands.
func (u User) inherit(d *os.File) error {
	var dir, file unix.Stat_t
	if err := unix.Fstat(int(d.Fd()), &dir); err != nil {
		return err
	}
	if dir.Uid == u.UID {
		return nil
	}
	names, err := d.Readdirnames(maxInherited)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for _, name := range names {
		fd, err := unix.Openat(int(d.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		err = unix.Fstat(fd, &file)
		if err == nil && file.Mode&unix.S_IFMT == unix.S_IFREG && file.Nlink == 1 && file.Uid == dir.Uid {
			err = unix.Fchownat(fd, "", int(u.UID), int(u.GID), unix.AT_EMPTY_PATH)
		}
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	return nil
}
