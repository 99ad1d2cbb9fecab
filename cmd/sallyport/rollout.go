package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// undecided is the exit code of a rollout that has too few calls to be judged, or
// not ended in the time that it was watched.
const undecided = 4

// watchEvery is how often the issuer is asked how a rollout does.
const watchEvery = 250 * time.Millisecond

// rollout is "sallyport rollout".
func (c *cli) rollout() *cobra.Command {
	cmd := &cobra.Command{
		Use: "rollout", Short: "Move the calls of a route to its canary, and back",
		Long: "Move the calls of a route to its canary, step by step, as the rollout of the route\n" +
			"says. The issuer compares the canary with the other backends by what the sidecars\n" +
			"of the callers count, and takes all calls back when it does worse than it may.\n\n" +
			"Exit codes: 0 done, or completed; 1 rolled back, aborted, superseded or refused;\n" +
			"2 usage; 3 the issuer does not answer; 4 too few calls to tell, or the time of\n" +
			"--timeout is over.",
	}
	cmd.PersistentFlags().BoolFunc("json", "the same as -o json", func(string) error { c.format = "json"; return nil })
	cmd.AddCommand(c.rolloutStart(), c.rolloutWatch(), c.rolloutPause(), c.rolloutPromote(), c.rolloutAbort(), c.rolloutStatus())
	return cmd
}

// A routeName is SERVICE/ROUTE.
type routeName struct {
	service mesh.ServiceName
	route   string
}

func (n routeName) String() string { return string(n.service) + "/" + n.route }

func parseRouteName(s string) (routeName, error) {
	service, route, ok := strings.Cut(s, "/")
	if !ok || service == "" || route == "" || strings.Contains(route, "/") {
		return routeName{}, usage(fmt.Errorf("%q is no SERVICE/ROUTE, such as billing/charges", s))
	}
	return routeName{mesh.ServiceName(service), route}, nil
}

// one has f done for the route that is named.
func (c *cli) one(cmd *cobra.Command, arg string, f func(context.Context, *control.Admin, routeName) error) error {
	n, err := parseRouteName(arg)
	if err != nil {
		return err
	}
	outcome := error(nil) // which has an exit code of its own
	err = c.with(cmd, "sallyport rollout status", func(ctx context.Context, a *control.Admin) error {
		err := f(ctx, a, n)
		if e := (*daemon.ExitError)(nil); errors.As(err, &e) {
			outcome, err = err, nil
		}
		return err
	})
	return cmp.Or(err, outcome)
}

// move moves a rollout, and says how it is then.
func (c *cli) move(ctx context.Context, a *control.Admin, n routeName, move string, force bool) error {
	d, err := a.MoveRollout(ctx, control.RolloutMove{Service: n.service, Route: n.route, Move: move, Force: force})
	if err == nil {
		err = c.tellDelivery(d)
	}
	return err
}

// tellDelivery prints a line of a rollout, of JSON or for people.
func (c *cli) tellDelivery(d mesh.Delivery) error {
	if c.format == "json" {
		return json.NewEncoder(c.stdout).Encode(d)
	}
	_, err := fmt.Fprintln(c.stdout, deliveryLine(d))
	return err
}

func deliveryLine(d mesh.Delivery) string {
	s := fmt.Sprintf("%s/%s: %s", d.Service, d.Route, stateOf(d))
	if d.State != mesh.Superseded {
		s += fmt.Sprintf("; canary %s has %s", d.Plan.Canary, d.Share)
	}
	if d.State != mesh.Superseded && d.Proxies > 0 { // which is not known at once
		s += fmt.Sprintf(", %d of %d proxies act on it", d.Acked, d.Proxies)
	}
	if v := d.Verdict; d.Active() && v.Verdict != "" {
		s += fmt.Sprintf("; %s: canary %s, others %s", v.Verdict, figureLine(v.Canary), figureLine(v.Others))
		if v.Why != "" && d.Why == "" {
			s += "; " + v.Why
		}
	}
	if d.Why != "" {
		s += "; " + d.Why
	}
	return s
}

func figureLine(f mesh.Figure) string {
	return fmt.Sprintf("%d calls %d failed %s", f.Calls, f.Failed, f.Latency.Round(10*time.Microsecond))
}

// stateOf is the state for people, with the step.
func stateOf(d mesh.Delivery) string {
	s := strings.ReplaceAll(string(d.State), "_", " ")
	if d.Active() && d.Step > 0 {
		s += fmt.Sprintf(", step %d of %d", d.Step, len(d.Plan.Steps))
	}
	return s
}

// find asks how the rollout of a route stands.
func find(ctx context.Context, a *control.Admin, n routeName) (mesh.Delivery, error) {
	list, err := a.Rollouts(ctx)
	if err != nil {
		return mesh.Delivery{}, err
	}
	for _, d := range list {
		if d.Service == n.service && d.Route == n.route {
			return d, nil
		}
	}
	return mesh.Delivery{}, daemon.Hint(failed(fmt.Errorf("no rollout of %s was started", n)), "sallyport rollout start "+n.String())
}

// watching says how long a rollout is watched, if it is.
type watching struct {
	on      bool
	timeout time.Duration
}

func (w *watching) flags(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&w.timeout, "timeout", 0, "how long to watch at most (default: until it ends)")
}

func (w *watching) validate(cmd *cobra.Command) error {
	if w.timeout < 0 || cmd.Flags().Changed("timeout") && w.timeout == 0 {
		return usage(fmt.Errorf("--timeout %s is too short: write a time such as 30m", w.timeout))
	}
	if !w.on && w.timeout > 0 {
		return usage(errors.New("--timeout is of --watch"))
	}
	return nil
}

// watch prints each change of a rollout until it ends, or somebody has to decide.
func (c *cli) watch(ctx context.Context, a *control.Admin, n routeName, w watching) error {
	last := ""
	for start := time.Now(); ; {
		d, err := find(ctx, a, n)
		if err != nil {
			return err
		}
		if now := fmt.Sprint(d.State, d.Step, d.Share, d.Acked, d.Proxies, d.Verdict.Verdict); now != last {
			last = now
			if err := c.tellDelivery(d); err != nil {
				return err
			}
		}
		if over, err := verdictOf(d); over {
			return err
		}
		if w.timeout > 0 && time.Since(start) >= w.timeout {
			return daemon.Hint(&daemon.ExitError{Code: undecided, Err: fmt.Errorf("the rollout of %s is not over after %s: it is %s", n, w.timeout, stateOf(d))}, "sallyport rollout watch "+n.String())
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(watchEvery):
		}
	}
}

// verdictOf says whether a rollout has come to where it stays by itself, and the
// exit code of that: nil when it is well.
func verdictOf(d mesh.Delivery) (over bool, err error) {
	n := routeName{d.Service, d.Route}
	switch d.State {
	case mesh.Completed:
		return true, nil
	case mesh.RolledBack:
		return true, daemon.Hint(failed(fmt.Errorf("the rollout of %s is rolled back: %s", n, d.Why)), "mend the canary, and sallyport rollout start "+n.String())
	case mesh.Superseded:
		return true, failed(fmt.Errorf("the rollout of %s is superseded: %s", n, d.Why))
	case mesh.Stalled:
		return true, daemon.Hint(&daemon.ExitError{Code: undecided, Err: fmt.Errorf("the rollout of %s has stalled: %s", n, d.Why)},
			"sallyport rollout start "+n.String()+" to go on, or promote --force, or abort")
	}
	return false, nil
}

func (c *cli) rolloutStart() *cobra.Command {
	var w watching
	cmd := &cobra.Command{
		Use: "start SERVICE/ROUTE", Short: "Start a rollout, or go on with one that was paused or has stalled", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := w.validate(cmd); err != nil {
				return err
			}
			return c.one(cmd, args[0], func(ctx context.Context, a *control.Admin, n routeName) error {
				err := c.move(ctx, a, n, "start", false)
				if err == nil && w.on {
					err = c.watch(ctx, a, n, w)
				}
				return err
			})
		},
	}
	cmd.Flags().BoolVar(&w.on, "watch", false, "watch it until it ends")
	w.flags(cmd)
	return cmd
}

func (c *cli) rolloutWatch() *cobra.Command {
	w := watching{on: true}
	cmd := &cobra.Command{
		Use: "watch SERVICE/ROUTE", Short: "Print each change of a rollout until it ends", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := w.validate(cmd); err != nil {
				return err
			}
			return c.one(cmd, args[0], func(ctx context.Context, a *control.Admin, n routeName) error { return c.watch(ctx, a, n, w) })
		},
	}
	w.flags(cmd)
	return cmd
}

func (c *cli) rolloutPause() *cobra.Command {
	return &cobra.Command{
		Use: "pause SERVICE/ROUTE", Short: "Keep the canary at its share until start or promote", Args: cobra.ExactArgs(1),
		Long: "Keep the canary at its share until start or promote. When it does badly it goes\nback all the same.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.one(cmd, args[0], func(ctx context.Context, a *control.Admin, n routeName) error {
				return c.move(ctx, a, n, "pause", false)
			})
		},
	}
}

func (c *cli) rolloutPromote() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "promote SERVICE/ROUTE", Short: "Take the next step now, through a gate or before its time", Args: cobra.ExactArgs(1),
		Long: "Take the next step now, through a gate or before its time. The canary must be\njudged to do well; --force takes it with too few calls to tell.",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.one(cmd, args[0], func(ctx context.Context, a *control.Admin, n routeName) error {
				return c.move(ctx, a, n, "promote", force)
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "though there are too few calls to tell")
	return cmd
}

func (c *cli) rolloutAbort() *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use: "abort SERVICE/ROUTE", Short: "Take all calls from the canary, also after the last step", Args: cobra.ExactArgs(1),
		Long: "Take all calls from the canary at once, also after the last step. It returns when\nevery connected proxy has acknowledged: no call that begins then goes to the canary.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if wait < 0 {
				return usage(fmt.Errorf("--wait %s is negative", wait))
			}
			return c.one(cmd, args[0], func(ctx context.Context, a *control.Admin, n routeName) error {
				d, err := a.MoveRollout(ctx, control.RolloutMove{Service: n.service, Route: n.route, Move: "abort"})
				if err != nil {
					return err
				}
				for end := time.Now().Add(wait); err == nil; {
					if d, err = find(ctx, a, n); err != nil || d.Acked >= d.Proxies || !time.Now().Before(end) {
						break
					}
					select {
					case <-ctx.Done():
						return ctx.Err()
					case <-time.After(askEvery):
					}
				}
				if err == nil {
					err = c.tellDelivery(d)
				}
				if err == nil && wait > 0 && d.Acked < d.Proxies {
					err = daemon.Hint(failed(fmt.Errorf("%d of %d proxies have not acknowledged after %s", d.Proxies-d.Acked, d.Proxies, wait)), "sallyport status, and look at the logs of these proxies")
				}
				return err
			})
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 10*time.Second, "how long to wait until every connected proxy acts on it")
	return cmd
}

func (c *cli) rolloutStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status [SERVICE/ROUTE]", Short: "Show how rollouts stand", Args: cobra.MaximumNArgs(1),
		Long: "Show how rollouts stand. Of one that is named the exit code says how it does, as\nthat of watch.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.with(cmd, "sallyport status", func(ctx context.Context, a *control.Admin) error {
					list, err := a.Rollouts(ctx)
					if err != nil {
						return err
					}
					return c.emitDeliveries(list)
				})
			}
			return c.one(cmd, args[0], func(ctx context.Context, a *control.Admin, n routeName) error {
				d, err := find(ctx, a, n)
				if err == nil {
					err = c.tellDelivery(d)
				}
				if err == nil {
					_, err = verdictOf(d)
				}
				return err
			})
		},
	}
}

func (c *cli) emitDeliveries(list []mesh.Delivery) error {
	if list == nil {
		list = []mesh.Delivery{}
	}
	rows := make([][]string, 0, len(list))
	for _, d := range list {
		since := d.Since
		if !d.Active() {
			since = d.Ended
		}
		verdict := d.Verdict.Verdict
		if !d.Active() {
			verdict = "-"
		}
		rows = append(rows, []string{
			string(d.Service) + "/" + d.Route, stateOf(d), d.Plan.Canary.String(), d.Share.String(), fmt.Sprintf("%d/%d", d.Acked, d.Proxies), verdict, age(time.Since(since)), firstLine(d.Why),
		})
	}
	return c.emit(list, []string{"ROUTE", "STATE", "CANARY", "SHARE", "PROXIES", "VERDICT", "SINCE", "WHY"}, rows)
}
