package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/review"
)

// policy is "sallyport policy".
func (c *cli) policy() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Check the reviewed policy files"}
	var td string
	cmd.PersistentFlags().StringVar(&td, "trust-domain", "", "the trust domain (default: that of the first service)")
	cmd.AddCommand(&cobra.Command{
		Use: "lint DIR", Short: "Find mistakes and rows that do not do what they seem to", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return c.lint(args[0], td) },
	}, c.policyTest(&td), c.policyDiff(&td), c.policyExplain(&td), c.policyWhoCan(&td), c.policyCanReach(&td), c.policyReplay(&td), c.policySuggest(&td), c.policyShadow(), c.policyStatus(), c.policyPush(&td), c.policyPromote(), c.policyRollback(&td), c.policyKey(), c.policySign(&td), c.policyVerify())
	return cmd
}

// parsePolicies reads a folder. Mistakes in it are a failed check, a folder
// that is not there is a mistake on the command line.
func parsePolicies(dir, td string) (*mesh.Policies, error) {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return nil, usage(fmt.Errorf("%s is not a folder of policy files", dir))
	}
	var domain spiffeid.TrustDomain
	var err error
	if td != "" {
		if domain, err = spiffeid.TrustDomainFromString(td); err != nil {
			return nil, usage(fmt.Errorf("--trust-domain: %w", err))
		}
	} else if domain, err = guessTrustDomain(dir); err != nil {
		return nil, usage(fmt.Errorf("%w; name it with --trust-domain", err))
	}
	p, err := mesh.ParseDir(dir, domain)
	if err == nil {
		err = p.Validate()
	}
	if err != nil {
		return nil, &daemon.ExitError{Code: daemon.Failed, Err: err}
	}
	return p, nil
}

func (c *cli) lint(dir, td string) error {
	p, err := parsePolicies(dir, td)
	if err != nil {
		return err
	}
	findings := review.Lint(p, time.Now())
	for _, f := range findings {
		fmt.Fprintln(c.stdout, f)
	}
	fmt.Fprintf(c.stdout, "%d rules, %d services, %d entries, %d findings\n", len(p.Rules), len(p.Services), len(p.Entries), len(findings))
	if len(findings) > 0 {
		return &daemon.ExitError{Code: daemon.Failed, Err: errors.New("findings to look at")}
	}
	return nil
}

// policyTest is "sallyport policy test".
func (c *cli) policyTest(td *string) *cobra.Command {
	var least percent
	cmd := &cobra.Command{
		Use: "test DIR", Short: "Decide the cases in DIR/tests and show which rows and conditions they cover", Args: cobra.ExactArgs(1),
		Long: "Decide the cases in DIR/tests and show which rows and conditions they cover. A\n" +
			"row is covered when it decides a case, a condition when it alone keeps its row\n" +
			"from fitting a case.",
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := parsePolicies(args[0], *td)
			if err != nil {
				return err
			}
			return c.tested(review.Test(p), int(least))
		},
	}
	cmd.Flags().Var(&least, "coverage", "fail when the cases cover less of rows and conditions, such as 90%")
	return cmd
}

// tested prints a report; it fails when a case does or too little is covered.
func (c *cli) tested(rep review.Report, least int) error {
	err := rep.Err()
	if got := rep.Coverage(); err == nil && got < least {
		err = fmt.Errorf("the cases cover %d%% of rows and conditions, less than %d%%", got, least)
	}
	if c.format == "json" {
		return errors.Join(c.emit(rep, nil, nil), failed(err))
	}
	for _, r := range rep.Results {
		if r.OK {
			fmt.Fprintf(c.stdout, "ok    %s\n", r.Case.Name)
		}
	}
	for _, r := range rep.Failed() {
		fmt.Fprintf(c.stdout, "FAIL  %s\n", r.Error())
	}
	for _, row := range rep.Rows {
		if row.Cases == 0 {
			fmt.Fprintf(c.stdout, "row   %s: %s is decided by no case\n", row.Origin, row.ID)
		}
		for _, cond := range row.Conds {
			if cond.Cases == 0 {
				fmt.Fprintf(c.stdout, "cond  %s: %s: no case shows what %s is for\n", row.Origin, row.ID, cond.Cond)
			}
		}
	}
	conds, all := rep.CoveredConds()
	fmt.Fprintf(c.stdout, "%d cases, %d failed, %d of %d rows and %d of %d conditions covered: %d%%\n",
		len(rep.Results), len(rep.Failed()), rep.Covered(), len(rep.Rows), conds, all, rep.Coverage())
	return failed(err)
}

// percent is a flag such as 90%.
type percent int

func (p *percent) String() string { return fmt.Sprintf("%d%%", int(*p)) }

func (p *percent) Type() string { return "percent" }

func (p *percent) Set(s string) error {
	n, err := strconv.Atoi(strings.TrimSuffix(s, "%"))
	if err != nil || n < 0 || n > 100 {
		return errors.New("write a number from 0 to 100, such as 90%")
	}
	*p = percent(n)
	return nil
}

// anyID finds a SPIFFE ID in any of the files.
var anyID = regexp.MustCompile(`spiffe://([a-z0-9._-]+)/`)

// guessTrustDomain takes the trust domain that the services are written with.
func guessTrustDomain(dir string) (spiffeid.TrustDomain, error) {
	for _, name := range []string{"services.yaml", "entries.yaml", "access.csv"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			continue // the parser says what is wrong with it
		}
		if m := anyID.FindSubmatch(b); m != nil {
			return spiffeid.TrustDomainFromString(string(m[1]))
		}
	}
	return spiffeid.TrustDomain{}, fmt.Errorf("no file in %s names a trust domain", dir)
}
