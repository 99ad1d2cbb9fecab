package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
)

// maxReview bounds a question: Kubernetes takes objects up to 3 MiB.
const maxReview = 4 << 20

// The parts of admission.k8s.io/v1 that are needed.
type (
	review struct {
		APIVersion string    `json:"apiVersion"`
		Kind       string    `json:"kind"`
		Request    *request  `json:"request,omitempty"`
		Response   *response `json:"response,omitempty"`
	}
	request struct {
		UID  string `json:"uid"`
		Kind struct {
			Group, Version, Kind string
		} `json:"kind"`
		SubResource string          `json:"subResource"`
		Namespace   string          `json:"namespace"`
		Operation   string          `json:"operation"`
		Object      json.RawMessage `json:"object"`
		OldObject   json.RawMessage `json:"oldObject"`
	}
	response struct {
		UID       string  `json:"uid"`
		Allowed   bool    `json:"allowed"`
		Status    *status `json:"status,omitempty"`
		PatchType string  `json:"patchType,omitempty"`
		Patch     []byte  `json:"patch,omitempty"`
	}
	status struct {
		Code    int32  `json:"code"`
		Message string `json:"message"`
	}
)

// A hook answers Kubernetes.
type hook struct {
	cfg *Config
	log *slog.Logger
}

// ServeHTTP answers one AdmissionReview. What cannot be read is an error of HTTP,
// which with failurePolicy Fail makes no pod; so is a pod that cannot have a
// sidecar, with the reason.
func (h *hook) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxReview))
	if err != nil {
		http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	var in review
	if err := json.Unmarshal(b, &in); err != nil || in.Request == nil || in.Request.UID == "" || in.APIVersion != "admission.k8s.io/v1" {
		http.Error(w, "no AdmissionReview of admission.k8s.io/v1 with a request", http.StatusBadRequest)
		return
	}
	out := review{APIVersion: in.APIVersion, Kind: "AdmissionReview", Response: h.answer(in.Request)}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(out); err != nil {
		h.log.Error("the answer was not sent", "err", err)
	}
}

func (h *hook) answer(in *request) *response {
	out := &response{UID: in.UID}
	ops, err := h.patch(in)
	if err == nil && len(ops) > 0 {
		out.PatchType = "JSONPatch"
		out.Patch, err = json.Marshal(ops)
	}
	if err != nil {
		h.log.Warn("pod refused", "namespace", in.Namespace, "err", err)
		out.Status = &status{Code: http.StatusForbidden, Message: "sallyport: " + err.Error()}
		return out
	}
	h.log.Info("pod seen", "namespace", in.Namespace, "changes", len(ops))
	out.Allowed = true
	return out
}

// patch says what to add to the pod: nothing to what is none, or has a sidecar of
// ours. A pod is judged in either case, as it may have been changed since, and so
// is a container that is put into a pod later.
func (h *hook) patch(in *request) ([]operation, error) {
	if in.Kind.Kind != "Pod" || in.Kind.Group != "" {
		return nil, nil
	}
	if in.Operation == "UPDATE" && in.SubResource == "" {
		return nil, keeps(in.OldObject, in.Object, h.cfg)
	}
	later := in.Operation == "UPDATE" && in.SubResource == "ephemeralcontainers"
	if !later && (in.Operation != "CREATE" || in.SubResource != "") {
		return nil, nil
	}
	var p pod
	if err := json.Unmarshal(in.Object, &p); err != nil {
		return nil, fmt.Errorf("the pod cannot be read: %w", err)
	}
	switch {
	case later && !p.has(sidecarName):
		return nil, nil // nothing that could be got around
	case later:
		return nil, p.judge(p.Spec.Ephemeral, h.cfg)
	case p.Metadata.Annotations[annotationInject] != "false":
	case slices.Contains(h.cfg.OptOut, in.Namespace):
		return nil, nil
	default:
		return nil, fmt.Errorf("annotation %s: %q holds in no namespace that opt_out of the injector does not name; leave it out, or make the pod where there are no sidecars", annotationInject, "false")
	}
	injected := p.has(sidecarName) || p.has(captureName)
	if err := p.fits(h.cfg, injected); err != nil {
		return nil, err
	}
	if injected {
		return nil, p.ours(in.Object, h.cfg)
	}
	return p.with(h.cfg), nil
}
