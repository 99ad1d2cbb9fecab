package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// tap is "sallyport tap".
func (c *cli) tap() *cobra.Command {
	var f mesh.TapFilter
	var within time.Duration
	var most int
	var fields bool
	var agent string
	cmd := &cobra.Command{
		Use: "tap PROXY", Short: "Show the calls that pass a sidecar or a gateway, as they end", Args: cobra.ExactArgs(1),
		Long: `Show the calls that pass a sidecar, as they end, or the requests and tunnels that go
out through a gateway. PROXY is the name of its node or its admin socket, on this
machine. Or it is the SPIFFE ID of its workload, on whatever machine: then the issuer
asks the proxy, for whom rows of admin.csv allow mesh.Tap. Queries and bodies are
never shown, and of the fields of a request only values that are no secrets. The
proxy records who looks, and the issuer too if it is asked. Nobody waits: calls that
come faster than they are shown are counted.

Exit code 0, also when no call came.`,
		Example: "  sallyport tap web --dst spiffe://corp.example/ns/shop/sa/payment --status 5xx --for 30s\n" +
			"  sallyport tap spiffe://corp.example/ns/sys/sa/gateway --status denied -n 1",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.Validate(); err != nil {
				return usage(err)
			}
			if most < 0 || within < 0 {
				return usage(errors.New("--count and --for are not negative"))
			}
			ctx := cmd.Context()
			if within > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, within)
				defer cancel()
			}
			if strings.HasPrefix(args[0], "spiffe://") {
				t, err := tapOf(args[0], agent)
				if err != nil {
					return err
				}
				t.Filter, t.Within = f, within
				return c.with(cmd, "sallyport status", func(_ context.Context, a *control.Admin) error { return c.watchAfar(ctx, a, t, most, fields) })
			}
			socket, err := proxySocket(args[0])
			if err != nil {
				return err
			}
			return c.watchCalls(ctx, socket, f, most, fields)
		},
	}
	cmd.Flags().StringVar(&agent, "agent", "", "the SPIFFE ID of the proxy's node, when its workload has several")
	cmd.Flags().StringVar(&f.Reporter, "reporter", "", "inbound, outbound or gateway (default all)")
	cmd.Flags().StringVar(&f.Src, "src", "", "the caller's SPIFFE ID")
	cmd.Flags().StringVar(&f.Dst, "dst", "", "the service's SPIFFE ID, or host:NAME")
	cmd.Flags().StringVar(&f.Method, "method", "", "the method")
	cmd.Flags().StringVar(&f.Path, "path", "", "what the path begins with")
	cmd.Flags().StringVar(&f.Status, "status", "", "a status such as 503, a class such as 5xx, or denied")
	cmd.Flags().DurationVar(&within, "for", 0, "how long to look (default until interrupted, at most 10m)")
	cmd.Flags().IntVarP(&most, "count", "n", 0, "end after so many calls (default never)")
	cmd.Flags().BoolVar(&fields, "headers", false, "show the fields of requests")
	return cmd
}

// tapOf reads which proxy is meant.
func tapOf(workload, agent string) (t control.Tap, err error) {
	if t.Workload, err = spiffeid.FromString(workload); err != nil {
		return t, usage(fmt.Errorf("%s: %w", workload, err))
	}
	if agent != "" {
		if t.Agent, err = spiffeid.FromString(agent); err != nil {
			return t, usage(fmt.Errorf("--agent: %w", err))
		}
	}
	return t, nil
}

// watchAfar is watchCalls through the issuer.
func (c *cli) watchAfar(ctx context.Context, a *control.Admin, t control.Tap, most int, fields bool) error {
	n := 0
	return a.Tap(ctx, t, func(call *mesh.Tapped) error {
		if err := c.showCall(call, fields); err != nil {
			return err
		}
		if n++; n == most {
			return control.ErrEnough
		}
		return nil
	})
}

// watchCalls shows calls until ctx ends, or there were enough.
func (c *cli) watchCalls(ctx context.Context, socket string, f mesh.TapFilter, most int, fields bool) error {
	client := daemon.AdminClient(socket)
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://admin/tap?"+f.Query(), nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return daemon.Exit(daemon.Unreachable, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // what came says enough
		if resp.StatusCode == http.StatusNotFound {
			said = []byte("what runs there is no sidecar or gateway, or of an older version")
		}
		return daemon.Exit(daemon.Failed, errors.New(strings.TrimSpace(string(said))))
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
	for n := 0; most == 0 || n < most; n++ {
		if !lines.Scan() {
			if ctx.Err() != nil {
				return nil // long enough
			}
			return lines.Err()
		}
		var t mesh.Tapped
		if err := json.Unmarshal(lines.Bytes(), &t); err != nil {
			return fmt.Errorf("the proxy says what is no call: %w", err)
		}
		if err := c.showCall(&t, fields); err != nil {
			return err
		}
	}
	return nil
}

func (c *cli) showCall(t *mesh.Tapped, fields bool) error {
	if !fields {
		t.Headers = nil
	}
	if c.format == "json" {
		return json.NewEncoder(c.stdout).Encode(t)
	}
	if t.Missed > 0 {
		fmt.Fprintf(c.stdout, "... %d calls came too fast to be shown\n", t.Missed)
	}
	_, err := fmt.Fprint(c.stdout, callText(t))
	return err
}

// callText is a call in a line, and its fields below. What a client has written is
// quoted where it could move a terminal.
func callText(t *mesh.Tapped) string {
	var b strings.Builder
	status := fmt.Sprint(t.Status)
	if t.Status == 0 {
		status = "none"
	}
	if t.GRPC != "" {
		status += "/" + plain(t.GRPC)
	}
	fmt.Fprintf(&b, "%s %-8s %s -> %s %s %s %s %.1fms", t.Time.Format("15:04:05.000"), plain(t.Reporter), plain(t.Src), plain(cmp.Or(t.Dst, "-")), plain(cmp.Or(t.Method, "-")), plain(t.Path), status, t.Took)
	for _, more := range []struct{ name, text string }{{"flag", t.Flag}, {"route", t.Route}, {"decision", t.Decision}, {"trace", t.Trace}} {
		if more.text != "" {
			fmt.Fprintf(&b, " %s=%s", more.name, plain(more.text))
		}
	}
	if t.Retries > 0 {
		fmt.Fprintf(&b, " retries=%d", t.Retries)
	}
	if t.Shadow {
		b.WriteString(" shadow")
	}
	b.WriteByte('\n')
	for _, h := range t.Headers {
		fmt.Fprintf(&b, "    %s: %s\n", plain(h[0]), plain(h[1]))
	}
	return b.String()
}

// plain is text as it is if a terminal shows all of it, and quoted if not.
func plain(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' }) {
		return fmt.Sprintf("%+q", text)
	}
	return text
}
