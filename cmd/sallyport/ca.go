package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
)

// ca is "sallyport ca".
func (c *cli) ca() *cobra.Command {
	cmd := &cobra.Command{Use: "ca", Short: "The root of the trust domain and its replacement"}
	cmd.AddCommand(&cobra.Command{
		Use:   "status",
		Short: "Show the roots, the JWT keys, and who confirms the next step",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.roots(func(a *control.Admin) (control.RootStatus, error) { return a.Roots(cmd.Context()) })
		},
	})
	var force, through, emergency bool
	rotate := &cobra.Command{
		Use:   "rotate",
		Short: "Take the next step of replacing the root",
		Long: "Take the next step of replacing the root: prepare, activate, taint, revoke.\n" +
			"Each waits until every live proxy confirms what it needs; --force goes on\n" +
			"without those that do not. --through takes the steps that follow as soon as\n" +
			"they may be taken. --emergency lets a new root sign at once and taints all\n" +
			"others; they are revoked when no live proxy shows them any more.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			move := control.MoveRotate
			if emergency {
				if force || through {
					return usage(errors.New("--emergency goes without --force and --through"))
				}
				move = control.MoveEmergency
			}
			return c.roots(func(a *control.Admin) (control.RootStatus, error) {
				return a.MoveRoots(cmd.Context(), move, force, through)
			})
		},
	}
	rotate.Flags().BoolVar(&force, "force", false, "leave behind the proxies that do not confirm")
	rotate.Flags().BoolVar(&through, "through", false, "go on by itself, through each gate, until the old root is revoked")
	rotate.Flags().BoolVar(&emergency, "emergency", false, "the root's key is known to others: replace it now")
	rollback := &cobra.Command{
		Use:   "rollback",
		Short: "Undo a rotation whose old root is not revoked yet",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.roots(func(a *control.Admin) (control.RootStatus, error) {
				return a.MoveRoots(cmd.Context(), control.MoveRollback, false, false)
			})
		},
	}
	cmd.AddCommand(rotate, rollback)
	return cmd
}

// roots prints what a call returns. A refusal is a failed check, not a lost
// connection.
func (c *cli) roots(call func(*control.Admin) (control.RootStatus, error)) error {
	a, err := c.admin()
	if err != nil {
		return err
	}
	defer a.Close()
	st, err := call(a)
	if errors.Is(err, control.ErrRefused) {
		return daemon.Exit(daemon.Failed, err)
	}
	if err != nil {
		return c.unreachable(err)
	}
	return c.printRoots(st)
}

func (c *cli) printRoots(st control.RootStatus) error {
	if c.format == "table" {
		fmt.Fprint(c.stdout, rootSummary(st, time.Now()), "\n")
	}
	rows := make([][]string, 0, len(st.Authorities))
	for _, x := range st.Authorities {
		state := "trusted"
		switch {
		case x.Signs:
			state = "signs"
		case x.Tainted:
			state = "tainted"
		}
		rows = append(rows, []string{x.Kind, fmt.Sprintf("%.20s", x.ID), state, expiry(x.Expires)})
	}
	return c.emit(st, []string{"KIND", "AUTHORITY", "STATE", "EXPIRES"}, rows)
}

// rootSummary says in words what stands between here and the next step.
func rootSummary(st control.RootStatus, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "root rotation: %s", st.Phase)
	if !st.Since.IsZero() {
		fmt.Fprintf(&b, " for %s", age(now.Sub(st.Since)))
	}
	if st.Emergency {
		b.WriteString(", EMERGENCY")
	}
	fmt.Fprintf(&b, "\nnext step: %s", st.Next)
	if st.Due.After(now) {
		fmt.Fprintf(&b, ", by time in %s", age(st.Due.Sub(now)))
	}
	b.WriteByte('\n')
	if st.Phase == "steady" {
		return b.String()
	}
	if !st.Known {
		b.WriteString("the issuer started a moment ago: it does not know yet which proxies live\n")
	}
	fmt.Fprintf(&b, "%d of %d confirm\n", st.Confirmed, st.Live)
	if st.IssuersLive > 0 {
		fmt.Fprintf(&b, "%d of %d issuers confirm\n", st.IssuersConfirmed, st.IssuersLive)
	}
	for _, name := range st.Stragglers {
		fmt.Fprintf(&b, "  not yet: %s\n", name)
	}
	if st.NotBefore.After(now) {
		fmt.Fprintf(&b, "tokens under the old key expire in %s\n", age(st.NotBefore.Sub(now)))
	}
	return b.String()
}
