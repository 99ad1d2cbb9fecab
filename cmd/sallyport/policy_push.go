package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/control"
	"sallyport/internal/mesh"
	"sallyport/internal/policyset"
)

// A pusher is what push and rollback share.
type pusher struct {
	c       *cli
	keys    []string
	wait    bool
	timeout time.Duration
}

func (p *pusher) flags(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringSliceVar(&p.keys, "key", nil, "the file of a private key that signs the set, may be repeated")
	cmd.Flags().BoolVar(&p.wait, "wait", false, "wait until every connected proxy acts on it")
	cmd.Flags().DurationVar(&p.timeout, "timeout", time.Minute, "how long to wait")
	return cmd
}

// policyPush is "sallyport policy push".
func (c *cli) policyPush(td *string) *cobra.Command {
	p := &pusher{c: c}
	return p.flags(&cobra.Command{
		Use: "push DIR|SET", Short: "Put a folder, or a set that is signed already, in force", Args: cobra.ExactArgs(1),
		Long: "Put a folder of policies in force, or a set that sallyport policy sign has made.\n" +
			"The issuer checks it, runs its tests and counts its signatures; it must follow on\n" +
			"the set in force. The issuer's configuration has policy.source: pushed.",
		RunE: func(cmd *cobra.Command, args []string) error {
			info, err := os.Stat(args[0])
			if err != nil {
				return usage(err)
			}
			return p.run(cmd, func(_ context.Context, _ *control.Admin, st mesh.IssuerStatus, keys []ed25519.PrivateKey) (*policyset.Signed, error) {
				if !info.IsDir() {
					return readSet(args[0])
				}
				return packed(args[0], *td, st.PolicyRevision+1, st.PolicySet)
			})
		},
	})
}

// policyRollback is "sallyport policy rollback".
func (c *cli) policyRollback() *cobra.Command {
	p := &pusher{c: c}
	return p.flags(&cobra.Command{
		Use: "rollback [REVISION]", Short: "Put an earlier set in force again, under a new revision", Args: cobra.MaximumNArgs(1),
		Long: "Put an earlier set in force again, under a new revision: revisions never go down.\n" +
			"Without REVISION, the set before the one in force. The issuer keeps the last\n" +
			"three. With --key, the earlier set must have the signature of that key too:\n" +
			"what is signed is what was signed before, whatever the issuer says.",
		RunE: func(cmd *cobra.Command, args []string) error {
			revision := uint64(0)
			if len(args) > 0 {
				var err error
				if revision, err = strconv.ParseUint(args[0], 10, 64); err != nil || revision == 0 {
					return usage(fmt.Errorf("%q is not a revision: write a number from 1", args[0]))
				}
			}
			return p.run(cmd, func(ctx context.Context, a *control.Admin, st mesh.IssuerStatus, keys []ed25519.PrivateKey) (*policyset.Signed, error) {
				return again(ctx, a, st, revision, keys)
			})
		},
	})
}

// again makes the set that follows on the one in force and says what an
// earlier one says.
func again(ctx context.Context, a *control.Admin, st mesh.IssuerStatus, revision uint64, keys []ed25519.PrivateKey) (*policyset.Signed, error) {
	b, err := a.PolicySet(ctx, revision)
	if err != nil {
		return nil, err
	}
	old, err := policyset.Parse(b)
	if err != nil {
		return nil, err
	}
	if revision != 0 && old.Revision != revision {
		return nil, fmt.Errorf("the issuer sends revision %d instead of %d", old.Revision, revision)
	}
	for _, k := range keys {
		if pin := policyset.KeyOf(k.Public().(ed25519.PublicKey)); !slices.Contains(old.Keys(), pin) {
			return nil, fmt.Errorf("revision %d is not signed by %s, so that what it says is the issuer's word alone: review the folder and push it", old.Revision, pin)
		}
	}
	next, err := policyset.New(policyset.Set{
		TrustDomain: old.TrustDomain, Revision: st.PolicyRevision + 1, Previous: st.PolicySet,
		Created: time.Now().UTC().Truncate(time.Second), Files: old.Files,
	})
	if err != nil {
		return nil, err
	}
	return next, checkedSet(next)
}

// run signs and pushes the set that make returns, and waits.
func (p *pusher) run(cmd *cobra.Command, make func(context.Context, *control.Admin, mesh.IssuerStatus, []ed25519.PrivateKey) (*policyset.Signed, error)) error {
	if p.timeout <= 0 {
		return usage(fmt.Errorf("--timeout %s is too short: write a time such as 30s", p.timeout))
	}
	var keys []ed25519.PrivateKey
	for _, file := range p.keys {
		k, err := readKey(file)
		if err != nil {
			return usage(err)
		}
		keys = append(keys, k)
	}
	var d distribution
	err := p.c.with(cmd, "sallyport policy status", func(ctx context.Context, a *control.Admin) error {
		st, err := a.Status(ctx)
		if err != nil {
			return err
		}
		set, err := make(ctx, a, st, keys)
		if err != nil {
			return err
		}
		for _, k := range keys {
			set.Sign(k)
		}
		if err := a.PushPolicy(ctx, set.Encode()); err != nil {
			return err
		}
		fmt.Fprintf(p.c.stderr, "revision %d is in force on the issuer, set %s, %d signatures\n", set.Revision, set.Hash(), len(set.Keys()))
		if d, err = awaitPolicies(ctx, a, p.wait, p.timeout); err == nil && d.Revision < set.Revision {
			err = errors.New("the issuer does not have in force what it accepted")
		}
		return err
	})
	if err == nil {
		err = p.c.emitDistribution(d)
	}
	if err == nil && p.wait {
		err = d.failure(p.timeout)
	}
	return err
}
