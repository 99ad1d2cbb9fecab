package rig

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// Metric adds up the samples of a metric of a program of ours, by the value of its
// first label.
func (p *Process) Metric(ctx context.Context, name string) (map[string]float64, error) {
	body, err := get(ctx, p.admin, "/metrics")
	if err != nil {
		return nil, err
	}
	defer body.Close()
	text, err := io.ReadAll(body)
	if err != nil {
		return nil, err
	}
	sums := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		rest, ok := strings.CutPrefix(line, name+"{")
		if !ok {
			continue
		}
		labels, value, _ := strings.Cut(rest, "} ")
		n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
		if err != nil {
			return nil, fmt.Errorf("metric %s: %w", name, err)
		}
		_, label, _ := strings.Cut(labels, `"`)
		label, _, _ = strings.Cut(label, `"`)
		sums[label] += n
	}
	return sums, nil
}

// Profile writes a CPU profile of the next d of a program of ours to a file. It
// must have been told to serve them (Config.Pprof, pprof: true).
func (p *Process) Profile(ctx context.Context, file string, d time.Duration) error {
	return p.save(ctx, file, fmt.Sprintf("profile?seconds=%.0f", d.Seconds()))
}

// Heap writes what lives in the memory of a program of ours to a file.
func (p *Process) Heap(ctx context.Context, file string) error {
	return p.save(ctx, file, "heap?debug=1")
}

func (p *Process) save(ctx context.Context, file, profile string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	body, err := get(ctx, p.admin, "/debug/pprof/"+profile)
	if err != nil {
		return err
	}
	defer body.Close()
	_, err = io.Copy(f, body)
	return err
}

// get asks an admin socket.
func get(ctx context.Context, socket, path string) (io.ReadCloser, error) {
	tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://admin"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("admin socket: %s: %s", path, resp.Status)
	}
	return resp.Body, nil
}
