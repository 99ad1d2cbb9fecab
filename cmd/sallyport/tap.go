package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// tap is "sallyport tap".
func (c *cli) tap() *cobra.Command {
	var f mesh.TapFilter
	var within time.Duration
	var most int
	var fields bool
	cmd := &cobra.Command{
		Use: "tap PROXY", Short: "Show the calls that pass a sidecar, as they end", Args: cobra.ExactArgs(1),
		Long: `Show the calls that pass a sidecar of this machine, as they end. PROXY is the name
of its node, or its admin socket. Queries and bodies are never shown, and of the
fields of a request only values that are no secrets. The sidecar records who looks.
It waits for nobody: calls that come faster than they are shown are counted.

Exit code 0, also when no call came.`,
		Example: "  sallyport tap web --dst spiffe://corp.example/ns/shop/sa/payment --status 5xx --for 30s",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.Validate(); err != nil {
				return usage(err)
			}
			if most < 0 || within < 0 {
				return usage(errors.New("--count and --for are not negative"))
			}
			socket, err := proxySocket(args[0])
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			if within > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, within)
				defer cancel()
			}
			return c.watchCalls(ctx, socket, f, most, fields)
		},
	}
	cmd.Flags().StringVar(&f.Reporter, "reporter", "", "inbound or outbound (default both)")
	cmd.Flags().StringVar(&f.Src, "src", "", "the caller's SPIFFE ID")
	cmd.Flags().StringVar(&f.Dst, "dst", "", "the service's SPIFFE ID")
	cmd.Flags().StringVar(&f.Method, "method", "", "the method")
	cmd.Flags().StringVar(&f.Path, "path", "", "what the path begins with")
	cmd.Flags().StringVar(&f.Status, "status", "", "a status such as 503, a class such as 5xx, or denied")
	cmd.Flags().DurationVar(&within, "for", 0, "how long to look (default until interrupted, at most 10m)")
	cmd.Flags().IntVarP(&most, "count", "n", 0, "end after so many calls (default never)")
	cmd.Flags().BoolVar(&fields, "headers", false, "show the fields of requests")
	return cmd
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
			said = []byte("what runs there is no sidecar, or of an older version")
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
		if err := c.showCall(lines.Bytes(), fields); err != nil {
			return err
		}
	}
	return nil
}

func (c *cli) showCall(line []byte, fields bool) error {
	var t mesh.Tapped
	if err := json.Unmarshal(line, &t); err != nil {
		return fmt.Errorf("the sidecar says what is no call: %w", err)
	}
	if !fields {
		t.Headers = nil
	}
	if c.format == "json" {
		return json.NewEncoder(c.stdout).Encode(t)
	}
	if t.Missed > 0 {
		fmt.Fprintf(c.stdout, "... %d calls came too fast to be shown\n", t.Missed)
	}
	_, err := fmt.Fprint(c.stdout, callText(&t))
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
		status += "/" + t.GRPC
	}
	fmt.Fprintf(&b, "%s %-8s %s -> %s %s %s %s %.1fms", t.Time.Format("15:04:05.000"), t.Reporter, plain(t.Src), plain(t.Dst), plain(t.Method), plain(t.Path), status, t.Took)
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
