package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/internal/daemon"
)

// uninstall is "sallyport uninstall".
func (c *cli) uninstall() *cobra.Command {
	var dir string
	var yes, purge bool
	cmd := &cobra.Command{
		Use: "uninstall", Short: "Take away what stands on this machine, the kernel's rules first", Args: cobra.NoArgs,
		Long: `Take away what the programs whose configurations are in a directory have on this
machine: first the rules of the kernel that bring a workload's connections to
its sidecar, then sockets and configuration, and with --purge state as well:
keys, databases, and audit logs, for good. The programs are the packages'.

Without --yes it only says what it would do. It stops nothing: what still runs
is named, and nothing is taken away before it is stopped.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := findInstalled(cmd.Context(), dir)
			if err != nil {
				return err
			}
			steps, err := planRemoval(all, purge)
			if err != nil {
				return err
			}
			return c.remove(cmd.Context(), all, steps, yes)
		},
	}
	cmd.Flags().StringVar(&dir, "dir", defaultDir, "the directory of the configurations")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it")
	cmd.Flags().BoolVar(&purge, "purge", false, "take away state, too: keys, databases and audit logs")
	return cmd
}

// A removal is one step, as it is told and as it is done.
type removal struct {
	Does string `json:"does"`
	do   func(context.Context) error
}

// planRemoval lists the steps in their order.
func planRemoval(all []*installed, purge bool) (steps []removal, err error) {
	for _, i := range all {
		if i.err != nil {
			return nil, daemon.Hint(daemon.Exit(daemon.Failed, fmt.Errorf("what %s has on this machine is not known: %w", i.config, i.err)), "mend "+i.config+", or move it away")
		}
	}
	for _, i := range all {
		if i.captures() {
			steps = append(steps, removal{"take the kernel's rules away: table inet " + i.Capture.Table, func(ctx context.Context) error {
				out, err := exec.CommandContext(ctx, i.path, "capture", "remove", "--config", i.config).CombinedOutput()
				if err != nil {
					return errors.New(strings.TrimSpace(string(out)))
				}
				return nil
			}})
		}
	}
	for _, i := range all {
		steps = append(steps, removal{"take away sockets: " + i.RunDir, func(context.Context) error { return removeSockets(i.RunDir) }})
		if !purge {
			continue
		}
		if strings.Count(filepath.Clean(i.DataDir), "/") < 2 {
			return nil, usage(fmt.Errorf("--purge: data_dir %s of %s is no directory of its own; take it away by hand", i.DataDir, i.config))
		}
		steps = append(steps, removal{"take away state: " + i.DataDir, func(context.Context) error { return os.RemoveAll(i.DataDir) }})
	}
	for _, i := range all {
		for _, f := range []string{i.config, i.Issuer.Bundle, i.Issuer.JoinTokenFile} {
			if f == i.config || f != "" && filepath.Dir(f) == filepath.Dir(i.config) {
				steps = append(steps, removal{"take away configuration: " + f, func(context.Context) error { return gone(os.Remove(f)) }})
			}
		}
	}
	return steps, nil
}

// removeSockets takes our sockets out of a directory, and it, if nothing else is
// in it.
func removeSockets(dir string) error {
	for _, name := range []string{"admin.sock", "api.sock", "workload.sock"} {
		if err := gone(os.Remove(filepath.Join(dir, name))); err != nil {
			return err
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		return gone(err)
	}
	return os.Remove(dir)
}

// gone takes what is not there for what was taken away.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// remove does the steps, or tells them.
func (c *cli) remove(ctx context.Context, all []*installed, steps []removal, yes bool) error {
	if yes {
		for _, i := range all {
			if pid, err := i.pid(); err == nil {
				return daemon.Hint(daemon.Exit(daemon.Failed, fmt.Errorf("%s still runs (pid %d), and nothing was taken away", i.name(), pid)), "stop it: systemctl stop, or kill "+fmt.Sprint(pid))
			}
		}
	}
	for _, s := range steps {
		if yes {
			if err := s.do(ctx); err != nil {
				return daemon.Exit(daemon.Failed, fmt.Errorf("%s: %w; what follows it was left", s.Does, err))
			}
		}
		if c.format != "json" {
			fmt.Fprintln(c.stdout, s.Does)
		}
	}
	if c.format == "json" {
		return c.emit(map[string]any{"done": yes, "steps": steps}, nil, nil)
	}
	if !yes {
		fmt.Fprintln(c.stdout, "\nnothing was taken away; next:\n  sallyport uninstall --yes")
	}
	return nil
}
