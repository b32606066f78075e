// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"fmt"

	"github.com/landlock-lsm/go-landlock/landlock"
)

// Files leaves the process, for good, no file but those beneath dir, which it
// may read and write, and what the runtime reads (Landlock, Linux 5.13). On a
// kernel without Landlock it does nothing: permissions alone then keep the
// process from other files, and `sallyport check` says so.
func Files(dir string) error {
	err := landlock.V5.BestEffort().RestrictPaths(
		landlock.RWDirs(dir).WithRefer(),
		landlock.RODirs("/proc/self"),
		landlock.ROFiles("/dev/urandom", "/etc/localtime").IgnoreIfMissing(),
	)
	if err != nil {
		return fmt.Errorf("close files other than %s: %w", dir, err)
	}
	return nil
}
