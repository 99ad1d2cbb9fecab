package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// fault is "sallyport fault".
func (c *cli) fault() *cobra.Command {
	cmd := &cobra.Command{Use: "fault", Short: "Faults that routes make on purpose"}
	cmd.AddCommand(&cobra.Command{
		Use: "list", Short: "List the faults of the policy in force, and how they stand", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd, "sallyport policy status", func(ctx context.Context, a *control.Admin) error {
				list, err := a.Faults(ctx)
				if err != nil {
					return err
				}
				rows := make([][]string, 0, len(list))
				for _, f := range list {
					state := f.State
					if f.Stop != nil {
						state += " by " + f.Stop.By
					}
					rows = append(rows, []string{f.Name, state, f.Does, f.Share.String(), f.Until.UTC().Format(time.RFC3339), strings.Join(f.Callers, " ")})
				}
				return c.emit(list, []string{"FAULT", "STATE", "DOES", "SHARE", "UNTIL", "CALLERS"}, rows)
			})
		},
	}, c.faultStop())
	return cmd
}

func (c *cli) faultStop() *cobra.Command {
	var wait, hold time.Duration
	var all bool
	cmd := &cobra.Command{
		Use: "stop SERVICE/ROUTE/FAULT|--all", Short: "End faults at every sidecar, now",
		Long: "End a fault, or all, at every sidecar. What it holds up goes on at once, and none\n" +
			"that the policy has begin within --hold touches a call. The policy stays as it is:\n" +
			"take the fault out of it, too. The issuer and every sidecar record it.",
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := mesh.AllFaults
			switch {
			case all == (len(args) == 1):
				return usage(errors.New("name one fault, as sallyport fault list does, or give --all"))
			case !all:
				name = args[0]
			}
			if wait < 0 || hold < 0 || hold > 30*24*time.Hour {
				return usage(errors.New("--wait is not negative, and --hold from 0 to 720h"))
			}
			s := mesh.FaultStop{Fault: name, Before: time.Now().Add(hold)}
			if err := s.Validate(); err != nil {
				return usage(err)
			}
			var out stopped
			err := c.with(cmd, "sallyport fault list", func(ctx context.Context, a *control.Admin) (err error) {
				out, err = c.stopNow(ctx, a, s, wait)
				return err
			})
			if err == nil && len(out.Missing) > 0 && wait > 0 {
				err = daemon.Hint(&daemon.ExitError{Code: daemon.Failed, Err: fmt.Errorf(
					"the faults are stopped, but %d sidecars do not say yet that they act on it: %s", len(out.Missing), strings.Join(out.Missing, ", "),
				)}, "sallyport status, and look at the logs of these sidecars")
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all faults, also those that a policy brings meanwhile")
	cmd.Flags().DurationVar(&hold, "hold", 24*time.Hour, "also faults that are to begin within this time")
	cmd.Flags().DurationVar(&wait, "wait", 10*time.Second, "how long to wait until every connected sidecar acts on it")
	return cmd
}

// A stopped is what the command prints as JSON.
type stopped struct {
	mesh.FaultStop
	// Faults are those of the policy in force that it holds for.
	Faults []string `json:"faults"`
	heeded
}

// stopNow stops faults and says which sidecars do not act on it in time.
func (c *cli) stopNow(ctx context.Context, a *control.Admin, s mesh.FaultStop, wait time.Duration) (out stopped, err error) {
	known, err := a.Faults(ctx)
	if err != nil {
		return out, err
	}
	out = stopped{FaultStop: s, Faults: []string{}}
	stops := &mesh.FaultStops{All: []mesh.FaultStop{s}}
	for _, f := range known {
		if f.State != mesh.FaultOver && stops.Of(f.Name, f.Since) != nil {
			out.Faults = append(out.Faults, f.Name)
		}
	}
	if s.Fault != mesh.AllFaults && len(out.Faults) == 0 {
		return out, daemon.Hint(usage(fmt.Errorf("no fault %q of the policy in force begins before %s", s.Fault, s.Before.UTC().Format(time.RFC3339))), "sallyport fault list")
	}
	rev, err := a.StopFaults(ctx, s)
	if err != nil {
		return out, err
	}
	sidecar := func(p mesh.Proxy) bool { return p.Kind == control.KindSidecar }
	acts := func(p mesh.Proxy) bool { return p.Traffic != nil && p.Traffic.Stops >= rev }
	if err := out.await(ctx, a, wait, sidecar, acts); err != nil {
		return out, err
	}
	rows := make([][]string, 0, len(out.Faults))
	for _, f := range out.Faults {
		rows = append(rows, []string{f})
	}
	if err := c.emit(out, []string{"STOPPED"}, rows); err != nil {
		return out, err
	}
	fmt.Fprintf(c.stderr, "%d of %d connected sidecars act on it\n", out.Confirmed, out.Connected)
	return out, nil
}

// ejections is "sallyport ejections".
func (c *cli) ejections() *cobra.Command {
	return &cobra.Command{
		Use: "ejections", Short: "Show which endpoints, services and hosts are not called, and why",
		Long: "Show which endpoints sidecars have put aside, which fail their health checks, and\n" +
			"which services are cut off: how many sidecars say so, since when, and why. Of\n" +
			"hosts outside the mesh gateways say it.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd, "sallyport status", func(ctx context.Context, a *control.Admin) error {
				ps, err := a.Proxies(ctx)
				if err != nil {
					return err
				}
				list := mesh.SumEjections(ps)
				if c.format != "table" {
					return c.emit(list, nil, nil)
				}
				for _, e := range list {
					fmt.Fprintln(c.stdout, plain(e.String()))
				}
				if len(list) == 0 {
					fmt.Fprintln(c.stdout, "nobody ejects anything")
				}
				return nil
			})
		},
	}
}
