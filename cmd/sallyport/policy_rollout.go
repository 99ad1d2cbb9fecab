package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
)

// canaryFlags are those of a push to a canary group.
type canaryFlags struct {
	group    []string
	bake     time.Duration
	fallback string
	hold     bool
}

func (f *canaryFlags) flags(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&f.group, "canary", nil, "let these proxies try it first: a SPIFFE ID or pattern, agent=PATTERN, node=SELECTOR, kind=KIND or a share such as 5%; may be repeated")
	cmd.Flags().DurationVar(&f.bake, "bake", 5*time.Minute, "how long they must do well before all follow by themselves; 0: not before sallyport policy promote")
	cmd.Flags().StringVar(&f.fallback, "fallback", "", "a signed set that says what is in force, by which they go back (default: made of it, and signed with --key)")
	cmd.Flags().BoolVar(&f.hold, "hold", false, "no fallback: when one fails, they stay on the set until somebody decides")
}

// validate says which flags do not go together.
func (f *canaryFlags) validate(cmd *cobra.Command) error {
	if len(f.group) == 0 {
		for _, name := range []string{"bake", "fallback", "hold"} {
			if cmd.Flags().Changed(name) {
				return usage(fmt.Errorf("--%s is of a canary group: name its proxies with --canary", name))
			}
		}
		return nil
	}
	_, err := mesh.ParseGroup(f.group)
	switch {
	case err != nil:
		return usage(err)
	case f.bake < 0 || f.bake > mesh.MaxBake || f.bake%time.Second != 0:
		return usage(fmt.Errorf("--bake %s: write whole seconds, at most %s", f.bake, mesh.MaxBake))
	case f.hold && f.fallback != "":
		return usage(errors.New("--hold is without a fallback: leave --fallback out"))
	}
	return nil
}

// back makes the set by which a canary group goes back from next, nil when there
// is none.
func (f *canaryFlags) back(ctx context.Context, g *signing, next *policyset.Signed) (*policyset.Signed, error) {
	switch {
	case len(f.group) == 0 || f.hold:
		return nil, nil
	case f.fallback != "":
		return readSet(f.fallback)
	case g.st.PolicySet == "":
		return nil, errors.New("no pushed set is in force that the other proxies could stay on: push one without --canary first")
	}
	set, err := g.back(ctx, next)
	if err != nil {
		return nil, fmt.Errorf("make the fallback: %w; or give one with --fallback, or go without by --hold", err)
	}
	return set, nil
}

// policyPromote is "sallyport policy promote".
func (c *cli) policyPromote() *cobra.Command {
	p := &pusher{c: c}
	var force bool
	cmd := &cobra.Command{
		Use: "promote", Short: "Put in force for all what a canary group tries", Args: cobra.NoArgs,
		Long: "Put in force for all what a canary group tries, before its bake is over. Every\n" +
			"canary proxy must have acknowledged it; --force goes on without those that have not.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return p.then(cmd, func(ctx context.Context, a *control.Admin) (uint64, error) {
				st, err := a.Status(ctx)
				if err != nil {
					return 0, err
				}
				if !st.Rollout.Active() {
					return 0, errors.New("no set is tried by a canary group")
				}
				if err := a.MovePolicy(ctx, control.PolicyMove{Move: control.MovePromote, Revision: st.Rollout.Revision, Force: force}); err != nil {
					return 0, err
				}
				fmt.Fprintf(c.stderr, "revision %d is in force on the issuer, set %s\n", st.Rollout.Revision, st.Rollout.Set)
				return 0, nil
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "go on without the canary proxies that have not acknowledged")
	return p.waitFlags(cmd)
}

// takeBack ends a rollout by its fallback.
func (p *pusher) takeBack(ctx context.Context, a *control.Admin, ro *mesh.Rollout) error {
	if err := a.MovePolicy(ctx, control.PolicyMove{Move: control.MoveTakeBack, Revision: ro.Revision}); err != nil {
		return err
	}
	fmt.Fprintf(p.c.stderr, "revision %d is taken back; revision %d is in force on the issuer and says what was in force before\n", ro.Revision, ro.Fallback)
	return nil
}

// outcome is why a rollout that was waited for did not reach all, nil when it
// did or goes on.
func outcome(ro *mesh.Rollout) error {
	switch ro.State {
	case mesh.TakenBack:
		return daemon.Hint(fmt.Errorf("revision %d is taken back: %s", ro.Revision, ro.Why), "mend the policies, and push them again")
	case mesh.Held:
		return daemon.Hint(fmt.Errorf("revision %d is held: %s; its canary proxies stay on it", ro.Revision, ro.Why), "sallyport policy rollback --key FILE")
	case mesh.Overtaken:
		return fmt.Errorf("revision %d was overtaken: %s", ro.Revision, ro.Why)
	}
	return nil
}

// rolloutLine says how the newest rollout stands.
func rolloutLine(ro *mesh.Rollout, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "canary: revision %d, set %.12s, %s", ro.Revision, ro.Set, strings.ReplaceAll(string(ro.State), "_", " "))
	switch {
	case !ro.Active():
		fmt.Fprintf(&b, " %s ago", age(now.Sub(ro.Ended)))
	case ro.State == mesh.Held:
	case ro.Bake == 0:
		fmt.Fprintf(&b, " for %s, until it is promoted", age(now.Sub(ro.Started)))
	default:
		fmt.Fprintf(&b, " for %s of %s", age(now.Sub(ro.Started)), ro.Bake)
	}
	fmt.Fprintf(&b, "; %d of %d canary proxies ack (%s), pushed by %s", ro.Acked, ro.Members, strings.Join(ro.Group, ", "), cmp.Or(ro.By, "somebody"))
	if ro.Why != "" {
		fmt.Fprintf(&b, "\n  %s", firstLine(ro.Why))
	}
	return b.String()
}
