package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// upgrade is "sallyport upgrade".
func (c *cli) upgrade() *cobra.Command {
	cmd := &cobra.Command{Use: "upgrade", Short: "New versions of the programs"}
	var dir, bin string
	check := &cobra.Command{
		Use: "check --bin DIR", Short: "Say whether this machine can go over to the programs in a directory", Args: cobra.NoArgs,
		Long: `Say whether this machine can go over to the programs in a directory: whether they
take the configurations that are here, whether the mesh is at rest, and whether
there is room. Nothing is changed.

Go over in this order: issuer, gateways, sidecars; docs/lifecycle.md says how
without a failed request. An issuer brings its database up to date when it
starts, and an older one does not take it then: make a backup before.

Exit code 0: it can. 1: it can't, or not now.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if bin == "" {
				return usage(errors.New("--bin is needed: the directory with the new programs"))
			}
			all, err := findInstalled(cmd.Context(), dir)
			if err != nil {
				return err
			}
			r := newReport("upgrade check")
			for _, i := range all {
				upgradeOf(cmd.Context(), &r, i, filepath.Join(bin, i.program))
			}
			return c.report(r, false)
		},
	}
	check.Flags().StringVar(&dir, "dir", defaultDir, "the directory of the configurations")
	check.Flags().StringVar(&bin, "bin", "", "the directory with the new programs")
	cmd.AddCommand(check)
	return cmd
}

// An upgradeCheck is one line of what "upgrade check" looks at, of an issuer alone
// or of every program. Codes are stable: pipelines and docs/operate.md name them.
type upgradeCheck struct {
	code, name string
	issuer     bool
	look       func(ctx context.Context, i *installed, next string) diagnosis
}

func upgradeChecks() []upgradeCheck {
	return []upgradeCheck{
		{"UP001", "program", false, checkNext},
		{"UP002", "configuration", false, checkTakes},
		{"UP003", "proxies", true, func(ctx context.Context, i *installed, _ string) diagnosis { return checkPolicy(ctx, nil, i) }},
		{"UP004", "roots", true, checkRoots},
		{"UP005", "room", true, checkRoom},
	}
}

// upgradeOf looks at one program and the one that is to take its place.
func upgradeOf(ctx context.Context, r *doctorReport, i *installed, next string) {
	for _, c := range upgradeChecks() {
		// Of what has no configuration the second check says so.
		if !c.issuer || i.program == issuerProgram && i.err == nil {
			r.add(c.code, c.name, i.name(), c.look(ctx, i, next))
		}
	}
}

func checkNext(_ context.Context, i *installed, next string) diagnosis {
	to, err := buildOf(next)
	if err != nil {
		return bad("name the directory with the new programs with --bin", "%v", err)
	}
	from, err := buildOf(i.path)
	if err != nil {
		from = "unknown"
	}
	return good("%s, in place of %s", to, from)
}

func checkTakes(ctx context.Context, i *installed, next string) diagnosis {
	out, err := exec.CommandContext(ctx, next, "run", "--check-config", "--config", i.config).CombinedOutput()
	if err != nil {
		said := strings.TrimSpace(string(out))
		if said == "" {
			said = err.Error()
		}
		return bad("mend the configuration as CHANGELOG.md says, so that both versions take it", "%s", said)
	}
	return good("%s", i.config)
}

func checkRoots(ctx context.Context, i *installed, _ string) diagnosis {
	if _, err := i.pid(); err != nil {
		return notRunning()
	}
	phase, err := i.phase(ctx)
	switch {
	case err != nil:
		return skipped("%v", err)
	case phase != "steady":
		return bad("wait until it is done: sallyport ca status", "the root is being replaced: %s", phase)
	}
	return good("no replacement of the root is under way")
}

// checkRoom sees that a migration can write the database anew.
func checkRoom(_ context.Context, i *installed, _ string) diagnosis {
	if i.Database.URL != "" {
		return skipped("the database is PostgreSQL")
	}
	st, err := os.Stat(filepath.Join(i.DataDir, backupDatabase))
	if err != nil {
		return skipped("%v", err)
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(i.DataDir, &disk); err != nil {
		return skipped("%v", err)
	}
	free := int64(disk.Bavail) * disk.Bsize
	if free < 2*st.Size()+leastDisk {
		return bad("free space on "+i.DataDir, "%d MB are free, and the database has %d MB", free>>20, st.Size()>>20)
	}
	return good("%d MB free, the database has %d MB", free>>20, st.Size()>>20)
}
