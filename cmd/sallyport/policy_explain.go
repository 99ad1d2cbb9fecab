package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
	"sallyport/internal/review"
)

// policyExplain is "sallyport policy explain".
func (c *cli) policyExplain(td *string) *cobra.Command {
	return &cobra.Command{
		Use:   "explain DIR REQUEST",
		Short: "Say how a request would be decided, and why",
		Long: "Say how a request would be decided, and why. It is written as the other\n" +
			"commands print it, and names of services will do:\n\n" +
			"  sallyport policy explain policies 'payment -> billing POST /v1/charges'\n" +
			"  sallyport policy explain policies 'billing -> host:api.stripe.test:443 sni=api.stripe.test'\n\n" +
			"token(iss=... scope~... claim.X=...), env=NAME and at TIME may follow. Of a call to a host\n" +
			"outside it says how a gateway lets it out, in the words of \"way\" in tests.",
		Args: cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := parsePolicies(args[0], *td)
			if err != nil {
				return err
			}
			call, err := review.ParseRequest(p, strings.Join(args[1:], " "), time.Now())
			if err != nil {
				return usage(err)
			}
			x, err := review.Explain(p, call)
			if err != nil {
				return failed(err)
			}
			if c.format == "json" {
				return c.emit(x, nil, nil)
			}
			writeAccount(c.stdout, &x.Account)
			if x.Conds != "" && x.Conds != "-" {
				fmt.Fprintf(c.stdout, "while    %s\n", x.Conds)
			}
			if x.Among != nil {
				fmt.Fprintf(c.stdout, "as are   %s\n", x.Among.Calls())
			}
			if x.Way != nil {
				fmt.Fprintf(c.stdout, "way      %s\n", x.Way)
				for _, f := range x.Way.Facts {
					fmt.Fprintf(c.stdout, "         %s: %s\n", f.Name, f.Value)
				}
			}
			return nil
		},
	}
}

// writeAccount prints how a call was decided.
func writeAccount(w io.Writer, a *authz.Account) {
	verdict := "deny"
	if a.Allow {
		verdict = "allow"
	}
	by := string(a.Reason)
	if a.Rule != "" {
		by = "row " + a.Rule
		if a.Origin != "" {
			by += " (" + a.Origin + ")"
		}
	}
	if a.Identity+a.Dst == "" {
		fmt.Fprintf(w, "%-8s what was asked is not in a record\n", verdict)
	} else {
		fmt.Fprintf(w, "%-8s %s %s -> %s port %d %s %s\n", verdict, a.Dir, a.Identity, a.Dst, a.Port, a.Verb, a.Path)
	}
	fmt.Fprintf(w, "by       %s\n", by)
	for _, t := range a.Tried {
		fmt.Fprintf(w, "tried    %s\n", t)
	}
	if a.Nearest != nil && !slices.Contains(a.Tried, *a.Nearest) {
		fmt.Fprintf(w, "nearest  %s\n", a.Nearest)
	}
	if a.Add != "" {
		fmt.Fprintf(w, "to allow exactly this, add\n  %s\n", a.Add)
	}
	if a.NoAdd != "" {
		fmt.Fprintf(w, "to add   nothing: %s\n", a.NoAdd)
	}
}

// policyWhoCan is "sallyport policy who-can".
func (c *cli) policyWhoCan(td *string) *cobra.Command {
	return &cobra.Command{
		Use:   "who-can DIR DESTINATION...",
		Short: "List exactly who may call a service, a SPIFFE ID or a host:NAME",
		Args:  cobra.MinimumNArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := parsePolicies(args[0], *td)
			if err != nil {
				return err
			}
			var all []review.Reach
			for _, to := range args[1:] {
				dir, dst, err := p.Target(mesh.Case{To: to})
				if err != nil {
					return usage(errors.New(strings.TrimPrefix(err.Error(), "to ")))
				}
				rs, err := review.WhoCan(p, dir, dst, time.Now())
				if err != nil {
					return failed(err)
				}
				all = append(all, rs...)
			}
			return c.reached(all, "callers")
		},
	}
}

// policyCanReach is "sallyport policy can-reach".
func (c *cli) policyCanReach(td *string) *cobra.Command {
	return &cobra.Command{
		Use:   "can-reach DIR IDENTITY",
		Short: "List exactly what a service or SPIFFE ID may call",
		Args:  cobra.ExactArgs(2),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := parsePolicies(args[0], *td)
			if err != nil {
				return err
			}
			id, err := review.Caller(p, args[1])
			if err != nil {
				return usage(err)
			}
			rs, err := review.CanReach(p, id, time.Now())
			if err != nil {
				return failed(err)
			}
			return c.reached(rs, "destinations")
		},
	}
}

// reached prints sets of calls that are allowed; known says what the known
// names are.
func (c *cli) reached(rs []review.Reach, known string) error {
	if c.format == "json" {
		if rs == nil {
			rs = []review.Reach{}
		}
		return c.emit(rs, nil, nil)
	}
	for i := range rs {
		r := &rs[i]
		fmt.Fprintf(c.stdout, "%s\n    by row %s", r.Calls(), r.Is)
		if len(r.Known) > 0 && (len(r.Known) > 1 || r.Known[0] != r.Src && r.Known[0] != r.Dst) {
			fmt.Fprintf(c.stdout, "; %s in these files: %s", known, strings.Join(r.Known, " "))
		}
		fmt.Fprintln(c.stdout)
	}
	fmt.Fprintf(c.stdout, "%s allowed\n", count(len(rs), "cell"))
	return nil
}
