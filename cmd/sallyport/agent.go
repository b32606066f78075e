// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/sallyport-dev/sallyport/agent"
	"github.com/sallyport-dev/sallyport/agent/config"
	"github.com/sallyport-dev/sallyport/agent/loader"
	"github.com/sallyport-dev/sallyport/policies/load"
	"github.com/sallyport-dev/sallyport/userspace"
	"github.com/sallyport-dev/sallyport/userspace/confine"
	"github.com/sallyport-dev/sallyport/userspace/line"
)

// lineFD is where the userspace process finds its end of the line.
const lineFD = 3

var errNotRoot = errors.New("it needs root: CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID")

func newAgent() *cobra.Command {
	c := &cobra.Command{
		Use: "agent", Short: "Run the agent of this node", Args: cobra.NoArgs,
		Long: "Run the agent of this node. Every setting has a default; flags go over SALLYPORT_* variables over the file.",
	}
	file := c.Flags().String("config", config.DefaultFile, "configuration file")
	config.AddFlags(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := loadConfig(*file, config.Given(c.Flags()))
		if err != nil {
			return err
		}
		if os.Geteuid() != 0 {
			return fmt.Errorf("run agent: %w", errNotRoot)
		}
		return agent.Run(c.Context(), agent.Options{
			Config: cfg, Version: version, Logger: newLogger(c.ErrOrStderr(), cfg.Log), Decisions: c.OutOrStdout(), Notices: c.ErrOrStderr(),
		})
	}
	c.AddCommand(newUninstall())
	return c
}

func newUninstall() *cobra.Command {
	c := &cobra.Command{
		Use: "uninstall", Short: "Remove every program, link and map of a stopped agent: nothing is enforced any more", Args: cobra.NoArgs,
	}
	file := c.Flags().String("config", config.DefaultFile, "configuration file, for its pinDir")
	config.AddFlags(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := loadConfig(*file, config.Given(c.Flags()))
		if err != nil {
			return err
		}
		if os.Geteuid() != 0 {
			return fmt.Errorf("uninstall: %w", errNotRoot)
		}
		removed, err := loader.Uninstall(cfg.PinDir)
		for _, r := range removed {
			fmt.Fprintln(c.OutOrStdout(), "removed", r)
		}
		if err != nil {
			return fmt.Errorf("uninstall: %w", err)
		}
		if len(removed) == 0 {
			return fmt.Errorf("uninstall: no pins at %s: nothing was enforced from there; if the agent had another pinDir, give its --config or --pin-dir", cfg.PinDir)
		}
		fmt.Fprintf(c.OutOrStdout(), "%d pins removed from %s; nothing is enforced from there any more\n", len(removed), cfg.PinDir)
		return nil
	}
	return c
}

// loadConfig reads the configuration; all that is wrong with it is one error
// of several lines.
func loadConfig(file string, flags map[string]string) (*config.Config, error) {
	content, err := config.ReadFile(file)
	if err != nil {
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("read host name: %w", err)
	}
	cfg, problems := config.Load(config.Sources{Hostname: host, File: file, Content: content, Env: os.Environ(), Flags: flags})
	if cfg == nil {
		return nil, problemsError("read configuration", problems)
	}
	return cfg, nil
}

func problemsError(what string, problems []load.Problem) error {
	var errs []error
	for _, p := range problems {
		errs = append(errs, errors.New(p.String()))
	}
	return fmt.Errorf("%s:\n%w", what, errors.Join(errs...))
}

func newLogger(w io.Writer, l config.Log) *slog.Logger {
	o := &slog.HandlerOptions{Level: l.Level}
	if l.Format == "text" {
		return slog.New(slog.NewTextHandler(w, o))
	}
	return slog.New(slog.NewJSONHandler(w, o))
}

// newUserspace is the other half; the agent starts it.
func newUserspace() *cobra.Command {
	return &cobra.Command{
		Use: "userspace", Short: "Run the unprivileged half; started by the agent, never by hand", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := confine.Self(); err != nil {
				return err
			}
			socket, err := line.FromFD(lineFD)
			if err != nil {
				return err
			}
			log := slog.New(slog.NewJSONHandler(c.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelInfo}))
			return userspace.Run(c.Context(), socket, version, log, confine.Files)
		},
	}
}
