"""The errors of `make mutants`: what is wrong, the text, what is put in its place, and the tests that must fail.

A test is `objective::test_name` for `tests/diffusion/test_objective.py::test_name`; name the fewest that should notice. The text stands in its
file exactly once (`tests/test_mutants.py` looks).
"""

# ruff: noqa: E501

from __future__ import annotations

Row = tuple[str, str, str, str]

DATA: dict[str, list[Row]] = {
    "ldm/data/rng.py": [
        ("the seed has no part in the draws", "[seed, name]", "[0, name]", "streams::test_a_draw_is_a_function_of_seed_name_and_position_alone"),
        ("positions share their numbers", "[0, 0, position, 0]", "[position, 0, 0, 0]", "streams::test_positions_do_not_overlap_however_much_is_drawn"),
        ("the same order in each epoch", '"order", epoch', '"order", 0', "streams::test_order_is_a_permutation_in_each_epoch_and_another_in_the_next"),
    ],
    "ldm/data/masks.py": [
        ("nothing is masked where everything should be", "return np.ones((side, side), np.uint8)", "return np.zeros((side, side), np.uint8)", "masks::test_shares_of_the_kinds"),
        ("no side at all", "chosen[int(rng.integers(4))] = True", "", "masks::test_each_kind_leaves_something_and_fills_something"),
    ],
    "ldm/data/dataset.py": [
        ("masks of validation are those of training", 'self.prefix + "mask"', '"mask"', "inpaint::test_a_step_is_given_the_mask_and_the_rest_of_its_image"),
        ("values of the position, not of the image", "self._encoded(index)", "self._encoded(position % 8)", "conditions::test_samples_carry_the_values_of_their_own_row"),
        ("mirroring is drawn from the drop stream", 'self.seed, "flip"', 'self.seed, "drop"', "streams::test_each_choice_has_draws_of_its_own"),
        ("one in four is mirrored", '"flip", position) < 0.5', '"flip", position) < 0.25', "streams::test_flips_are_half_and_crops_even"),
        ("left becomes right under its caption", " or DIRECTION.search(text)", "", "streams::test_a_caption_that_says_left_or_right_is_never_mirrored"),
        ("validation is mirrored", "self.data.flip or self.validation or", "self.data.flip or", "streams::test_validation_is_in_order_in_the_middle_and_unmirrored"),
        ("validation is cropped anywhere", '"random" and not self.validation', '"random"', "streams::test_validation_is_in_order_in_the_middle_and_unmirrored"),
        ("validation is shuffled", "yield position if self.validation else self.order[position]", "yield self.order[position]", "streams::test_validation_is_in_order_in_the_middle_and_unmirrored"),
        ("validation has the noise of training", '"validation/" if validation else ""', '""', "streams::test_each_name_position_and_seed_has_numbers_of_its_own"),
        ("crops: rows for columns", "(float(y), float(x))", "(float(x), float(y))", "streams::test_each_choice_has_draws_of_its_own"),
        ("cached latents are never mirrored", "moments(index, self._mirror(text, position))", "moments(index)", "streams::test_a_cached_stream_gives_what_the_image_stream_gives_and_never_the_same_noise"),
        ("accumulation forgets the processes", "// (self.micro_batch * self.processes)", "// self.micro_batch", "streams::test_every_split_covers_the_same_positions_once"),
        ("ranks overlap", "+ self.rank * self.micro_batch", "+ self.rank", "streams::test_every_split_covers_the_same_positions_once"),
        ("each process validates on all", "range(rank, total, processes)", "range(0, total, processes)", "streams::test_validation_is_shared_out_once_and_stops_at_the_source"),
        ("the last, smaller batch of validation is dropped", "range(0, len(share), batch_size)", "range(0, len(share) - batch_size + 1, batch_size)", "streams::test_validation_is_shared_out_once_and_stops_at_the_source"),
        ("validation t: parts drawn twice", "while math.gcd(stride, total) != 1:", "while False:", "streams::test_validation_draws_every_part_once_and_not_in_order"),
        ("validation t: the lower end of each part", "(parts + 0.5) / total", "parts / total", "streams::test_validation_draws_every_part_once_and_not_in_order"),
    ],
    "ldm/data/transforms.py": [
        ("white is not quite 1", "/ 127.5 - 1", "/ 128 - 1", "images::test_levels_go_there_and_back"),
        ("pictures are cut, not rounded", "* 127.5).round().byte()", "* 127.5).byte()", "images::test_levels_go_there_and_back"),
        ("mirrored top to bottom", "image[:, ::-1]", "image[::-1]", "streams::test_flips_are_half_and_crops_even"),
        ("the last place of a crop never occurs", "int(u * (surplus + 1))", "int(u * surplus)", "streams::test_flips_are_half_and_crops_even"),
        ("the long side is fitted", "scale = max(down / height", "scale = min(down / height", "images::test_the_short_side_is_fitted_and_the_middle_is_cut"),
    ],
    "ldm/data/shapes.py": [
        ("combinations that were held out are trained on", 'combinations(objects, split == "held_out")', 'combinations(objects, False) + combinations(objects, True)', "shapes::test_splits_draw_from_their_own"),
        ("held out one way round alone", "for c, s in (first, second)) % 7", "for c, s in (first,)) % 7", "shapes::test_held_out_pairs_are_held_out_in_either_order"),
        ("validation shows the scenes of training", "self._offset = OFFSETS[split]", 'self._offset = OFFSETS["train"]', "shapes::test_splits_draw_from_their_own"),
    ],
    "ldm/data/textures.py": [
        ("validation shows the textures of training", "self._offset = OFFSETS[split]", 'self._offset = OFFSETS["train"]', "sources::test_textures_are_a_function_of_the_index"),
    ],
    "ldm/data/digits.py": [
        ("training holds the digits of validation", '== 0) == (split == "validation")', '== 0) >= (split == "validation")', "sources::test_digits_are_split_by_fives_and_keep_their_labels"),
    ],
    "ldm/data/writing.py": [
        ("a folder in use is written to", "if folder.exists() and not (", "if False and not (", "writing::test_what_exists_is_left_alone"),
        ("an unfinished folder is left", "with whole(folder) as place:", "for place in (folder,):", "writing::test_a_folder_that_is_not_finished_is_not_there"),
    ],
    "ldm/data/folder.py": [
        ("the shares of the splits are exchanged", '(split == "validation")]', '(split != "validation")]', "folder::test_split_is_stable_under_adding_files_and_has_the_asked_share"),
        ("validation holds training images", 'fraction) == (split == "validation")', 'fraction) <= (split == "validation")', "folder::test_folder_reads_images_captions_and_columns"),
        ("training sees validation images", 'fraction) == (split == "validation")', 'fraction) >= (split == "validation")', "folder::test_folder_reads_images_captions_and_columns"),
        ("a changed caption is the same data", "r.file_name, r.text, r.file_size", "r.file_name, r.file_size", "folder::test_fingerprint_follows_what_determines_the_samples"),
    ],
}  # fmt: skip

DIFFUSION: dict[str, list[Row]] = {
    "ldm/diffusion/timesteps.py": [
        ("the last t is never drawn", "(uniform.double() * num_steps).long()", "(uniform.double() * (num_steps - 1)).long()", "objective::test_uniform_timesteps_cover_all_evenly"),
        ("strata of the update, not of the place", "in_strata(uniform, position % self.batch_size", "in_strata(uniform, position // self.batch_size", "objective::test_strata_are_of_the_place_in_the_update"),
        ("importance: weights do not undo the draws", "return t, 1 / (self.num_steps * p[t])", "return t, self.num_steps * p[t]", "objective::test_importance_is_unbiased_and_varies_less"),
        ("importance: the square itself", ".mean(1).sqrt()", ".mean(1)", "objective::test_the_history_is_that_of_a_plain_loop"),
        ("importance begins with the first full row", ">= HISTORY).all()", ">= HISTORY).any()", "objective::test_the_history_is_that_of_a_plain_loop"),
        ("importance: no share stays uniform", "UNIFORM_SHARE = 0.001", "UNIFORM_SHARE = 0.0", "objective::test_the_history_is_that_of_a_plain_loop"),
    ],
    "ldm/diffusion/objective.py": [
        ("min-SNR is a max", "clamp(max=config.min_snr_gamma)", "clamp(min=config.min_snr_gamma)", "objective::test_weights_as_published"),
        ("P2 on x_0", "return snr / (1 + snr) **", "return 1 / (1 + snr) **", "objective::test_weights_as_published"),
        ("the bound's first weight is infinite", "_variational(schedule, torch.cat([variance[1:2], variance[1:]]))", "_variational(schedule, variance)", "objective::test_variational_weights_are_the_terms_of_the_bound"),
        ("the bound teaches the mean", "replace(pred, raw=pred.raw.detach())", "replace(pred)", "objective::test_l1_teaches_the_mean_and_the_bound_the_variance"),
        ("the bound of one step for all T", "vlb = self.schedule.num_steps * self", "vlb = self", "objective::test_the_hybrid_is_l1_and_a_thousandth_of_the_bound"),
        ("nats for bits", ".to(x0.dtype) / math.log(2)", ".to(x0.dtype)", "objective::test_the_hybrid_is_l1_and_a_thousandth_of_the_bound"),
        ("validation is weighted", "Terms(weighted, error, None)", "Terms(weighted, weighted, None)", "training::test_validation_is_the_mean_error_whole_and_by_tenths"),
        ("the classifier sees clean samples", "classifier(schedule.add_noise(x0, eps, t), t)", "classifier(x0, t)", "classifier::test_what_is_learned_is_the_cross_entropy_of_x_t"),
    ],
    "ldm/diffusion/windows.py": [
        ("the last window does not reach the edge", ", length - side]", "]", "windows::test_every_place_is_covered_by_whole_windows"),
        ("windows are summed", "total / weights.to(total.dtype)", "total", "windows::test_a_model_without_neighbours_is_itself"),
        ("a closed sample ends", "(start + torch.arange(side)) % length", "(min(start, length - side) + torch.arange(side))", "windows::test_a_closed_sample_has_no_seam"),
        ("further channels are cut at the corner", "concat=cond.concat[place]", "concat=cond.concat[..., : len(place[1]), : len(place[2])]", "windows::test_further_channels_are_cut_with_the_sample"),
    ],
    "ldm/diffusion/completion.py": [
        ("the known part is drawn", "x, self.mask)", "x, 1 - self.mask)", "completion::test_the_known_part_has_the_noise_of_its_level_at_every_step"),
        ("the known part keeps the noise of the step's beginning", "grid[step + 1], eps", "grid[step], eps", "completion::test_the_known_part_has_the_noise_of_its_level_at_every_step"),
        ("the way back without noise", " + like(variance.sqrt(), x) * noise", " + 0 * noise", "completion::test_the_way_back_has_the_variance_of_the_process"),
        ("a jump too few", "repeats - 1)", "repeats - 2)", "completion::test_the_path_is_the_published_one"),
    ],
    "ldm/diffusion/conditioner.py": [
        ("a class counts little", "= math.sqrt(self.width)", "= 1.0", "conditioner::test_slices_are_their_formulas"),
        ("a number is not standardised", "(_number(value) - self.mean) / self.std", "_number(value)", "conditioner::test_units_do_not_matter"),
        ("a number at its mean looks dropped", "torch.cat([torch.ones(1), (omega", "torch.cat([torch.zeros(1), (omega", "conditioner::test_no_value_is_encoded_as_none"),
        ("a dropped condition takes the next one along", "at : at + part.width], zeros)", "at : at + part.width], zeros + 1)", "conditioner::test_each_condition_is_dropped_alone"),
    ],
    "ldm/pipeline/given.py": [
        ("images are not those of their pictures", "torch.as_tensor(places)", "torch.arange(len(places))", "editing::test_each_picture_may_have_an_image_of_its_own"),
        ("nothing is pasted", "return torch.lerp(self.images.to(drawn), drawn, self.masks.to(drawn))", "return drawn", "editing::test_known_pixels_are_kept"),
    ],
    "autoencoder/strips.py": [
        ("a strip forgets a row behind it", "REACH = 2", "REACH = 1", "strips::test_the_result_is_the_whole_one"),
        ("no padding at the edge", "max(-first, 0), max(end - self.height, 0)", "0, 0", "strips::test_the_result_is_the_whole_one"),
        ("rows of an upsampled strip are off by one", "x[:, :, first % 2 :", "x[:, :, 0 :", "strips::test_the_result_is_the_whole_one"),
    ],
    "ldm/diffusion/guidance.py": [
        ("scale counted from the conditional model", "pred = base\n", "pred = cond\n", "guidance::test_classifier_free_is_its_formula_in_one_batch"),
        ("with and without exchanged", "base, cond = preds[0], preds[-1]", "cond, base = preds[0], preds[-1]", "guidance::test_classifier_free_is_its_formula_in_one_batch"),
        ("what counts nothing is evaluated", "in terms if weight]", "in terms]", "guidance::test_one_and_zero_are_the_model_itself_in_one_evaluation"),
        ("what is steered away from counts the other way", "((cond, -weight) for", "((cond, weight) for", "guidance::test_two_scales_are_instruct_pix2pix_in_one_batch"),
        ("the whole condition leaves out what the others add", "last = self.scale + sum(weight for _, weight in self.away)", "last = self.scale", "guidance::test_each_of_several_parts_is_guided_alone"),
        ("outside the interval nothing is asked for", "if self.scale == 0 and not self.away else", "if self.scale == 0 else", "guidance::test_outside_the_interval_the_whole_condition_is_called_alone"),
        ("the interval without its lower end", "(interval[0] <= ratio)", "(interval[0] < ratio)", "guidance::test_outside_the_interval_there_is_one_evaluation_and_no_guidance"),
        ("the interval without its upper end", "(ratio <= interval[1])", "(ratio < interval[1])", "guidance::test_outside_the_interval_there_is_one_evaluation_and_no_guidance"),
        ("rescale by what is left of phi", "keepdim=True) + 1 - phi)", "keepdim=True) + 1)", "guidance::test_rescale_is_that_of_diffusers_on_the_networks_own_output"),
        ("thresholding makes small images loud", "dim=1).clamp(min=1)", "dim=1)", "guidance::test_dynamic_thresholding_is_imagens"),
        ("no signal, and yet a gradient", "torch.where(a > 0, per_score(target, a, s), 0.0)", "per_score(target, a, s)", "guidance::test_no_signal_is_nothing_to_classify"),
        ("autoguidance counted from 0", "(self.guide_scale - 1) *", "self.guide_scale *", "guidance::test_autoguidance_takes_the_place_of_the_unconditional_model"),
        ("the variance is the unconditional one", "halves[-1][1]", "halves[0][1]", "guidance::test_a_learned_variance_is_that_of_the_conditional_evaluation"),
        ("the shift of the mean has no interval", "gradient(x_t, t) if guides(schedule, interval, t) else torch.zeros_like(x_t)", "gradient(x_t, t)", "guidance"),
    ],
    "ldm/diffusion/schedule.py": [
        ("zero terminal SNR moves the first step", " * signal[0] / (signal[0] - signal[-1])\n    bar", " / (signal[0] - signal[-1])\n    bar", "diffusion::test_zero_terminal_snr_as_printed"),
        ("the shift counts once", "- 2 * math.log(ratio)", "- math.log(ratio)", "diffusion::test_a_resolution_shift_moves_lambda"),
        ("one step is enough", "len(betas) < 2:", "len(betas) < 1:", "diffusion::test_a_process_of_one_step_is_refused"),
        ("linear is rescaled to T", "    return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)", "    return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64) * 1000 / num_steps", "diffusion::test_tables_are_those_of_diffusers"),
    ],
    "ldm/diffusion/process.py": [
        ("the transition without its signal", "- (ratio * schedule.sigma(s)).square()", "- schedule.sigma(s).square()", "diffusion::test_posterior_is_bayes_rule"),
        ("the learned variance upside down", "nu = (output + 1) / 2", "nu = (1 - output) / 2", "diffusion::test_learned_variance_lies_between_its_ends"),
    ],
    "ldm/diffusion/targets.py": [
        ("v with the wrong sign", "Row(p=a, q=-s, r=1, det=1)", "Row(p=a, q=s, r=1, det=1)", "objective::test_losses_of_the_targets_differ_by_the_snr"),
        ("v weighs like eps", '"v": lambda snr: snr + 1,', '"v": lambda snr: snr,', "objective::test_a_weighting_is_one_objective_for_all_targets"),
        ("flow points at the noise alone", "Row(p=1, q=-1, r=1, det=a + s)", "Row(p=1, q=-1, r=1, det=1)", "targets::test_conversions_solve_the_linear_system"),
        ("v is read as eps", "_sum((row.p, x_t), (-s * row.r, prediction))", "_sum((1, x_t), (-s * row.r, prediction))", "diffusion::test_predictions_convert_without_loss"),
        ("the classifier pushes eps away", "return -s / row.r if absent(row.q)", "return s / row.r if absent(row.q)", "guidance::test_the_classifier_moves_the_score"),
        ("v is blind without signal", "TABLE[name](0.0, 1.0).det == 0)", "TABLE[name](0.0, 1.0).p == 0)", "targets::test_the_rows_are_those_of_the_configuration"),
    ],
    "ldm/diffusion/gaussian.py": [
        ("pixels of level −1 pass", "(level > -0.5)", "(level > -1.5)", "gaussian::test_pixels_are_checked"),
        ("pixels of level 256 pass", "(level < 255.5)", "(level < 256.5)", "gaussian::test_pixels_are_checked"),
        ("the outer bins are closed", "exact.abs() > 1 - HALF_BIN", "exact.abs() > 1 + HALF_BIN", "gaussian::test_the_masses_of_256_bins_sum_to_one"),
        ("bins of one level's width to either side", "HALF_BIN = 1 / 255", "HALF_BIN = 2 / 255", "gaussian::test_bins_are_differences_of_scipys_cdf"),
    ],
    "ldm/diffusion/likelihood.py": [
        ("drawn steps are not weighted", "terms.append(weight * _summed(", "terms.append(_summed(", "likelihood::test_the_estimate_lies_within_its_standard_error"),
        ("bits per pixel, not per number", "(dimensions * math.log(2))", "dimensions", "likelihood::test_figures_are_nats_over_the_images_dimensions"),
        ("no probabilities without signal", "torch.where(expected.sum() > 0, expected, 1.0)", "expected", "likelihood::test_one_step_drawn_of_one_is_that_step"),
    ],
    "ldm/diffusion/learned_schedule.py": [
        ("the interior learns at half its gradient", "+ 2 * term * moved", "+ term * moved", "learned_schedule::test_the_interior_descends_the_second_moment_of_the_estimator"),
    ],
    "ldm/diffusion/samplers/grids.py": [
        ("trailing cuts where it should round", "[round(n - i * n / steps) - 1", "[int(n - i * n / steps) - 1", "samplers::test_grids_of_other_families_are_those_of_diffusers"),
        ("leading has no offset", "[node + min(offset, schedule.num_steps - 1 - nodes[-1])", "[node", "samplers::test_grids_are_those_of_diffusers"),
        ("another rho", "RHO = 7.0", "RHO = 5.0", "samplers::test_karras_and_uniform_grids_are_their_formulas"),
    ],
    "ldm/diffusion/consistency.py": [
        ("c_out with σ", "tau / square.sqrt()", "SIGMA_DATA * tau / square.sqrt()", "consistency::test_scalings_are_those_of_diffusers"),
        ("the student's end has a gradient", "with torch.no_grad():\n            pred", "with torch.enable_grad():\n            pred", "consistency::test_the_end_that_is_aimed_at_has_no_gradient"),
        ("the teacher steps to where it was", "x_t, s = self.schedule.add_noise(x0, eps, t), self.earlier(t)", "x_t, s = self.schedule.add_noise(x0, eps, t), t", "consistency::test_distillation_learns_where_the_teachers_flow_ends"),
        ("paths end at the first noise", "torch.where(s > 0, s, -1)", "s.clamp(min=0)", "consistency::test_clean_data_end_every_path_and_the_first_interval"),
        ("the end of x_s without its scalings", "end = self._end(average, x_s, s, cond)", "end = average(x_s, s, cond)", "consistency::test_the_loss_is_that_of_diffusers_schedulers"),
    ],
    "ldm/diffusion/samplers/consistency.py": [
        ("x̂_0 for the end of the path", "* consistency(pred)", "* pred.x0", "consistency::test_lcm_is_diffusers"),
        ("noise of the step that begins", "nodes.sigma[i + 1], x) * noise(i)", "nodes.sigma[i], x) * noise(i)", "consistency::test_lcm_is_diffusers"),
    ],
    "ldm/diffusion/samplers/ancestral.py": [
        ("eta not squared", "eta**2 * posterior", "eta * posterior", "samplers::test_ddim_is_diffusers"),
        ("the mean is shifted by the deviation", "pred, s, t).square() * mean_shift", "pred, s, t) * mean_shift", "guidance::test_the_two_forms_are_their_formulas"),
    ],
    "ldm/diffusion/samplers/langevin.py": [
        ("a quarter of the step", "(2 * snr * pred", "(snr * pred", "langevin::test_a_step_shrinks_and_spreads_as_it_should"),
        ("the whole drift", "delta / 2 * pred.score", "delta * pred.score", "langevin::test_steps_without_end_keep_the_variance"),
    ],
    "ldm/diffusion/samplers/dpm_solver.py": [
        ("2M without its half", "like(1 / (2 * r), history[0]) * (history[0] - history[1])", "like(1 / r, history[0]) * (history[0] - history[1])", "samplers::test_dpmpp_2m_is_diffusers"),
        ("orders lowered below 10 steps alone", "FEW_STEPS = 15", "FEW_STEPS = 10", "solvers::test_the_end_above_clean_data_is_that_of_diffusers"),
        ("orders lowered with 15 steps too", "FEW_STEPS = 15", "FEW_STEPS = 16", "solvers::test_the_end_above_clean_data_is_that_of_diffusers"),
        ("noise of the wrong share", "-torch.expm1(-2 * h)", "-torch.expm1(-h)", "solvers::test_solvers_that_must_agree"),
    ],
    "ldm/diffusion/samplers/edm.py": [
        ("LMS remembers three", "LMS_ORDER = 4", "LMS_ORDER = 3", "solvers::test_a_solver_is_of_its_order"),
        ("ancestral noise not squared", "(1 - (after / level).square()).sqrt()", "(1 - after / level).sqrt()", "solvers::test_solvers_that_must_agree"),
        ("Heun takes the slope at the end alone", "(nodes.level[i + 1] - nodes.level[i]) / 2, x) * (end - d)", "(nodes.level[i + 1] - nodes.level[i]), x) * (end - d)", "solvers::test_a_solver_is_of_its_order"),
    ],
    "ldm/diffusion/samplers/unipc.py": [
        ("UniPC: the weight of one unknown", "torch.full_like(ratios, 0.5)", "torch.full_like(ratios, 1.0)", "solvers::test_a_solver_is_of_its_order"),
    ],
}  # fmt: skip

TRAINING: dict[str, list[Row]] = {
    "ldm/training/stages/diffusion.py": [
        ("1 − p of the captions are dropped", 'batch["drop"] < self.config.caption_dropout', 'batch["drop"] > self.config.caption_dropout', "training::test_captions_are_dropped_where_their_draw_says"),
        ("one draw drops all conditions", 'batch[f"drop/{c.name}"]', 'batch["drop"]', "conditions::test_each_condition_is_dropped_by_draws_of_its_own"),
        ("the caption is kept where all is dropped", "dropped | joint, self", "dropped, self", "conditions::test_each_condition_is_dropped_by_draws_of_its_own"),
        ("other data move what values mean", "self.stream.encode = self.validation.encode = kept.row", "self.conditioner = measured", "conditions::test_a_run_goes_on_with_what_values_meant_when_it_began"),
        ("validation has no values", 'Condition(context, moved.get("vector"), self._concat(moved))', 'Condition(context, None, self._concat(moved))', "conditions::test_previews_and_validation_know_the_values"),
        ("the others are dropped", "NULL_CAPTION if drop else text", "text if drop else NULL_CAPTION", "training::test_captions_are_dropped_where_their_draw_says"),
        ("loss_by_t: tenths in reverse", "bins = t * BINS // self.schedule.num_steps", "bins = BINS - 1 - t * BINS // self.schedule.num_steps", "training::test_validation_is_the_mean_error_whole_and_by_tenths"),
        ("loss_by_t: shifted by half a tenth", "bins = t * BINS // self.schedule.num_steps", "bins = (t * BINS + BINS * 50) // self.schedule.num_steps % BINS", "training::test_validation_is_the_mean_error_whole_and_by_tenths"),
        ("validation adds the weights", "noising).error.double()", "noising).total.double()", "training::test_validation_is_the_mean_error_whole_and_by_tenths"),
        ("the error of one image for the mean's", ".clamp(min=0) / n).sqrt()", ".clamp(min=0)).sqrt()", "training::test_validation_is_the_mean_error_whole_and_by_tenths"),
        ("importance without its weights", "loss = (noising.weight * terms.total).mean()", "loss = terms.total.mean()", "objective::test_the_training_step_weighs_by_importance_and_remembers_without"),
    ],
    "ldm/training/stages/finetune.py": [
        ("new channels come first", "torch.cat([first, zeros], dim=1)", "torch.cat([zeros, first], dim=1)", "inpaint::test_a_text_model_with_new_channels_is_that_model_at_first"),
        ("a start with other conditions", "    if theirs != mine:\n", "    if False:\n", "conditions::test_a_start_must_have_the_same_conditions"),
        ("values mean what the new data say", "dataclasses.replace(info.conditioner, configs=config.conditions", "dataclasses.replace(info.conditioner, slices=info.conditioner.slices[::-1], configs=config.conditions", "conditions::test_a_start_keeps_what_values_meant"),
    ],
    "ldm/training/stages/distillation.py": [
        ("the teacher is not guided", "scale=self.distill.guidance_scale,", "", "initial::test_a_student_begins_as_its_teacher_which_stays"),
        ("another teacher after a resume", 'self._frozen["init"] = info.hash', "", "initial::test_a_lora_or_student_does_not_go_on_upon_another_base"),
    ],
    "ldm/training/stages/learned_schedule.py": [
        ("a learned schedule at the network's rate", 'self.config.schedule.lr / self.config.train.lr if network == "schedule" else 1.0', "1.0", "learned_schedule"),
    ],
    "ldm/training/loop.py": [
        ("accumulated gradients are sums", "self.accelerator.backward(loss / n)", "self.accelerator.backward(loss)", "training::test_accumulation_gives_the_gradient_of_the_whole_batch[ldm]"),
        ("metrics are sums over micro-batches", "{k: v / n + sums.get(k, 0.0)", "{k: v + sums.get(k, 0.0)", "training::test_an_update_clips_and_logs_means_over_its_micro_batches"),
        ("validation of the weights as trained", "with self._averaged():\n            metrics", "with torch.no_grad():\n            metrics", "training::test_the_averaged_weights_are_validated_and_drawn_from"),
        ("samples of the weights as trained", "with self._averaged():\n            return", "with torch.no_grad():\n            return", "training::test_the_averaged_weights_are_validated_and_drawn_from"),
        ("a student aims at itself", "{**self.prepared, AVERAGE: self.ema}", "self.prepared", "initial::test_a_student_aims_at_its_average"),
        ("the best model is the last one", "self._averaged(self.best.weights)", "self._averaged()", "best::test_the_kept_model_is_that_of_a_run_that_ended_there"),
        ("patience ends no run", "return self.step >= self.config.steps or self.best.over", "return self.step >= self.config.steps", "best::test_patience_ends_a_run_in_good_order"),
        ("the average takes in broken updates", "self.ema.update(self.step, finite)", "self.ema.update(self.step)", "training::test_an_update_that_is_not_finite_changes_nothing"),
    ],
    "ldm/training/best.py": [
        ("kept weights follow the average", 'snapshot({"best": self._ema.state()}, old)["best"]', "dict(self._ema.state())", "best::test_kept_weights_do_not_follow_the_average"),
        ("each process by its own figure", 'f"{name}_error")))[0]', 'f"{name}_error")))[self._processes.rank]', "best::test_all_processes_follow_the_main_one"),
        ("the best so far is forgotten at a resume", "        self.best = best\n", "", "best::test_a_run_that_is_killed_ends_as_if_nothing_had_happened"),
        ("kept weights are forgotten at a resume", 'self.weights = snapshot({"best": weights})["best"]', "pass", "best::test_a_run_that_is_killed_ends_as_if_nothing_had_happened[7]"),
    ],
    "ldm/runs/best.py": [
        ("equal is better", "self.step == 0 or gap < 0", "self.step == 0 or gap <= 0", "validations::test_a_rise_is_noticed_once_and_noise_is_none"),
        ("noise is a rise", "if gap > self.error:", "if gap > 0:", "validations::test_a_rise_is_noticed_once_and_noise_is_none"),
        ("a rise need not be in a row", "elif self.worse < RISEN:", "elif False:", "validations::test_a_rise_is_noticed_once_and_noise_is_none"),
        ("a rise is noticed again", "elif self.worse < RISEN:", "else:", "validations::test_a_rise_is_noticed_once_and_noise_is_none"),
        ("a best after the cut stays", "found > step:", "False:", "validations::test_a_kept_model_of_a_later_update_is_forgotten"),
    ],
    "ldm/config/figure.py": [
        ("the lowest PSNR is best", "return best - value if self.higher", "return value - best if self.higher", "validations::test_a_rise_is_noticed_once_and_noise_is_none"),
    ],
    "ldm/training/ema.py": [
        ("a ramp ten times as slow", "(1 + step) / (10 + step)", "(1 + step) / (100 + step)", "ema::test_ramp_follows_the_formula_in_float64"),
        ("the ramp alone", "min(self.decay, (1 + step)", "max(self.decay, (1 + step)", "ema::test_ramp_follows_the_formula_in_float64"),
        ("broken updates are averaged", "(1.0 - decay) * finite.float()", "torch.tensor(1.0 - decay)", "training::test_an_update_that_is_not_finite_changes_nothing"),
    ],
    "ldm/training/optimizers.py": [
        ("the first update has no rate", "(update + 1) / config.warmup", "update / config.warmup", "training::test_learning_rate_in_closed_form"),
        ("the cosine begins at update 0", "(update - config.warmup) / max", "update / max", "training::test_learning_rate_in_closed_form"),
        ("the cosine ends at 0", "(config.lr_end + (1 - config.lr_end) * 0.5", "((1 - config.lr_end) * 0.5", "training::test_learning_rate_in_closed_form"),
        ("gradients are not clipped", "self.config.clip if self.config.clip is not None else math.inf", "math.inf", "training::test_an_update_clips_and_logs_means_over_its_micro_batches"),
        ("networks have one rate", "* scale(name)", "* 1.0", "training::test_each_update_uses_its_rate"),
        ("no weight decay", '"weight_decay": config.weight_decay', '"weight_decay": 0.0', "training::test_the_optimizer_is_adamw_as_configured"),
        ("betas are torch's own", '"betas": config.betas, ', "", "training::test_the_optimizer_is_adamw_as_configured"),
        ("epsilon is torch's own", '"eps": config.adam_eps, ', "", "training::test_the_optimizer_is_adamw_as_configured"),
    ],
    "ldm/data/augment.py": [
        ("mirrored images are turned only", "mirror = quarter.cos().round(), quarter.sin().round(), 1 - 2 * (turn % 2)", "mirror = quarter.cos().round(), quarter.sin().round(), 1", "augment::test_turns_are_the_eight_of_a_square"),
        ("a zoom cuts beyond the image", "(1 - share) * (2 * draws[name] - 1)", "2 * draws[name] - 1", "augment::test_zoom_enlarges_a_part"),
        ("all channels are inverted together", "2 ** torch.arange(channels, device=images.device) % 2", "2 ** torch.zeros(channels).long() % 2", "augment::test_colours_are_exchanged_inverted_and_faded"),
    ],
    "ldm/training/muon.py": [
        ("no momentum", "torch.where(finite, MOMENTUM, 1.0)", "torch.where(finite, 0.0, 1.0)", "muon::test_steps_are_those_of_the_formula"),
        ("momentum is not Nesterov's", "torch._foreach_add(gradients, momenta, alpha=MOMENTUM)", "momenta", "muon::test_steps_are_those_of_the_formula"),
        ("the scale is that of the smaller side", "max(updates.shape[1:])", "min(updates.shape[1:])", "muon::test_torchs_own_muon_takes_the_same_steps"),
        ("matrices have the others' rate", '"ratio": ratio,', '"ratio": 1.0,', "muon::test_steps_are_those_of_the_formula"),
        ("matrices do not decay", '1 - rate * group["weight_decay"]', "1.0", "muon::test_steps_are_those_of_the_formula"),
        ("an infinite gradient reaches the momentum", "torch.where(finite, parameter.grad, 0.0)", "parameter.grad", "muon::test_a_step_that_is_not_finite_changes_nothing"),
        ("momentum goes on where a gradient is infinite", 'group["lr"] * finite', 'group["lr"]', "muon::test_a_step_that_is_not_finite_changes_nothing"),
        ("factors are not squared in the Gram matrix", "gram = factor @ gram @ factor", "gram = factor @ gram", "muon::test_orthogonalised_moves_singular_values_alone"),
        ("the timestep's projections are hidden", ' and "time_emb_proj" not in name', "", "muon::test_hidden_matrices_of_a_unet"),
    ],
    "ldm/runs/checkpoints/folder.py": [
        ("numbers of nine digits are no checkpoints", 'r"step-(\\d{8,})"', 'r"step-(\\d{8})"', "retention::test_more_digits_are_more"),
        ("the oldest intact one is resumed", "for path in reversed(steps(folder)):\n        found = check(path)", "for path in steps(folder):\n        found = check(path)", "retention::test_the_newest_is_the_highest_valid_number_and_no_other_name"),
        ("a flipped byte is not seen", "if digest is not None and file_hash(file) != digest:", "if False:", "checkpoint::test_damage_is_found_named_and_skipped"),
    ],
    "ldm/training/stages/autoencoder.py": [
        ("the adversarial term is not balanced", "gan_factor(update, loss) * self._adaptive * gan_gradient", "gan_factor(update, loss) * gan_gradient", "training::test_the_autoencoders_gradient_is_that_of_the_scalar_loss"),
        ("the KL is not weighted", 'loss.kl * terms["kl"]', 'terms["kl"]', "training::test_the_autoencoders_gradient_is_that_of_the_scalar_loss"),
        ("the latents' deviation without the posterior's", " + var.mean((1, 2))).sqrt()", ").sqrt()", "training::test_exported_latents_have_zero_mean_and_unit_variance"),
        ("the latents' deviation about 0", " - _centre(moments, n).square() + var", " + var", "training::test_exported_latents_have_zero_mean_and_unit_variance"),
        ("active channels are the quiet ones", "(variance > ACTIVE_VARIANCE)", "(variance < ACTIVE_VARIANCE)", "training::test_active_channels_are_those_whose_mean_varies_over_the_images"),
        ("noise not scaled to the latent", "(level * std).float()", "torch.full_like(std, level).float()", "training::test_figures_of_the_autoencoder_are_those_of_its_pictures"),
        ("PSNR beyond the pixels' range", '"psnr": psnr(clipped, image)', '"psnr": psnr(reconstruction, image)', "training::test_figures_of_the_autoencoder_are_those_of_its_pictures"),
        ("one rate for both networks", "return loss.disc_lr / train.lr if", "return 1.0 if", "training::test_each_update_uses_its_rate"),
    ],
    "ldm/training/stages/classifier.py": [
        ("accuracy_by_t: tenths in reverse", "1, t * BINS // self", "1, BINS - 1 - t * BINS // self", "classifier::test_validation_is_the_mean_whole_and_by_tenths"),
        ("the training loss is a sum", "backward(loss.mean())", "backward(loss.sum())", "classifier::test_what_is_learned_is_the_cross_entropy_of_x_t"),
    ],
}  # fmt: skip

MODELS: dict[str, list[Row]] = {
    "ldm/models/classifier.py": [
        ("the largest pixel for the mean", ".mean((2, 3))", ".amax((2, 3))", "classifier::test_the_classifier_averages_over_the_image"),
        ("the classifier is told no t", "t, self.config.channels[0]", "torch.zeros_like(t), self.config.channels[0]", "classifier::test_every_image_is_classified_by_itself_and_by_its_t"),
    ],
    "ldm/models/text.py": [
        ("a long caption loses its end", "[*row[: length - 1], end]", "row[:length]", "text::test_long_captions_are_cut_and_counted"),
        ("padding first", "row + [pad] * (length - len(row))", "[pad] * (length - len(row)) + row", "text::test_empty_caption_is_start_end_padding"),
        ("captions that just fit are counted as cut", "sum(len(row) > length", "sum(len(row) >= length", "text::test_long_captions_are_cut_and_counted"),
        ("a caption may end itself", "split_special_tokens=True, verbose", "verbose", "text::test_end_of_text_in_a_caption_is_characters"),
        ("the table lacks the null caption", "dict.fromkeys([NULL_CAPTION, *captions])", "dict.fromkeys(captions)", "text::test_caption_table_equals_direct_encoding"),
    ],
    "ldm/models/lora.py": [
        ("alpha is not divided by the rank", "(self.alpha / self.rank)  # type", "self.alpha  # type", "lora::test_output_and_gradients_are_those_of_peft"),
        ("a merge without its scale", "scale * change.matrix()", "change.matrix()", "lora::test_several_changes_live_merged_and_taken_off"),
        ("a live change without its scale", "(scale * change(inputs[0]))", "change(inputs[0])", "lora::test_several_changes_live_merged_and_taken_off"),
    ],
    "ldm/models/unet.py": [
        ("skips come first", "torch.cat([h, skips.pop()], dim=1)", "torch.cat([skips.pop(), h], dim=1)", "unet::test_forward_and_gradients_are_those_of_diffusers"),
        ("vectors and labels are dropped", "return time + self.class_embedding(given)", "return time", "sd_layouts::test_unet_and_its_gradients_are_those_of_diffusers"),
        ("control skips the middle", "h = h + middle", "h = h", "unet::test_control_is_added_to_the_skips_and_the_middle"),
    ],
    "ldm/models/layers.py": [
        ("sine before cosine", "[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]", "unet::test_forward_and_gradients_are_those_of_diffusers"),
        ("the gate is gated", "return x * F.gelu(gate)", "return gate * F.gelu(x)", "unet::test_forward_and_gradients_are_those_of_diffusers"),
        ("the transformer's norm with the blocks' epsilon", "channels, eps=1e-6)", "channels, eps=1e-5)", "unet::test_forward_and_gradients_are_those_of_diffusers"),
    ],
    "ldm/training/stages/clip.py": [
        ("true captions count as false", " if caption not in true]", "]", "clip_stage::test_no_caption_of_the_batch_counts_as_false"),
        ("swapped captions are forgotten", "same, negatives)", "same)", "clip_stage::test_an_image_is_contrasted_with_swapped_captions_too"),
    ],
    "ldm/models/clip.py": [
        ("vision positions are transformers'", "positions.mul_(config.position_std / model.vision_model.config.initializer_range)", "pass", "text::test_the_vision_towers_positions_start_as_spread_as_asked"),
    ],
    "ldm/models/contrastive.py": [
        ("images look for captions alone", "(F.cross_entropy(logits, target) + F.cross_entropy(of_images, target_of_images)) / 2", "F.cross_entropy(of_images, target_of_images)", "text::test_loss_of_distinct_captions_is_clips_own"),
        ("false captions are not weighed", "of_images, target_of_images = torch.cat([of_images, wrong], dim=1), F.pad(target, (0, len(negatives)))", "pass", "text::test_negatives_are_more_columns_for_the_images_alone"),
        ("equal captions count several times", " / same.sum(dim=1, keepdim=True)", "", "text::test_loss_of_equal_captions_shares_the_positive"),
    ],
    "autoencoder/loss.py": [
        ("the discriminator's sides exchanged", "F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits)", "F.relu(1.0 + real_logits).mean() + F.relu(1.0 - fake_logits)", "autoencoder_loss::test_hinge_values"),
        ("the adaptive weight upside down", "(rec_norm / (gan_norm + GRADIENT_FLOOR))", "(gan_norm / (rec_norm + GRADIENT_FLOOR))", "autoencoder_loss::test_adaptive_weight"),
        ("the adaptive weight without its floor", "(gan_norm + GRADIENT_FLOOR)", "gan_norm", "autoencoder_loss::test_adaptive_weight"),
        ("the adaptive weight without its limit", ".clamp(0.0, ADAPTIVE_MAX)", ".clamp(0.0)", "autoencoder_loss::test_adaptive_weight"),
        ("the adversary's ramp begins at update 0", "(update - config.gan_start) /", "update /", "autoencoder_loss::test_gan_factor_ramp"),
        ("the KL is a sum", "posterior.kl().mean()", "posterior.kl().sum()", "training::test_the_autoencoders_gradient_is_that_of_the_scalar_loss"),
        ("the VAE bound adds the KL", "log_likelihood - posterior.kl()", "log_likelihood + posterior.kl()", "likelihood::test_the_autoencoders_bound_is_tight_for_its_own_posterior"),
    ],
    "autoencoder/posterior.py": [
        ("the variance for the deviation", "(0.5 * self.logvar).exp()", "self.logvar.exp()", "autoencoder_loss::test_posterior_moments_clamp_and_sample"),
        ("the KL of a unit Gaussian is ½", "self.logvar.exp() - 1.0 - self.logvar", "self.logvar.exp() - self.logvar", "autoencoder_loss::test_kl_equals_torch_and_monte_carlo"),
        ("a wider range of the log-variance", "LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0", "LOGVAR_MIN, LOGVAR_MAX = -40.0, 20.0", "autoencoder_loss::test_posterior_moments_clamp_and_sample"),
    ],
    "autoencoder/metrics.py": [
        ("pixels of range 1", "DATA_RANGE = 2.0", "DATA_RANGE = 1.0", "autoencoder_metrics::test_psnr_closed_form"),
        ("another SSIM constant", "0.01, 0.03", "0.01, 0.01", "autoencoder_metrics::test_ssim_equals_the_direct_loop"),
        ("high along both axes at once", "(fy[:, None] > 0.25) |", "(fy[:, None] > 0.25) &", "autoencoder_metrics::test_high_frequency_energy_counts_above_half_nyquist"),
    ],
    "autoencoder/model.py": [
        ("the posterior keeps half of its old width", "bias[c:] -= 2.0 * s.log()", "bias[c:] -= s.log()", "autoencoder::test_fold_normalises_latents_and_keeps_images"),
        ("the decoder is not given the mean back", "+ weight[:, :, 0, 0] @ m", "", "autoencoder::test_fold_normalises_latents_and_keeps_images"),
        ("whitened latents keep their mean", ".sqrt()).T, values.mean(1))", ".sqrt()).T, torch.zeros_like(values.mean(1)))", "autoencoder::test_whiten_decorrelates_the_channels"),
    ],
}  # fmt: skip

AROUND: dict[str, list[Row]] = {
    "ldm/evaluation/judges/strict.py": [
        ("decoys refuse nothing", "fit.margin[i] > MARGIN", "fit.margin[i] > 9", "strict::test_wrong_outlines_are_refused"),
        ("what no template explains is accepted", "fit.residual[i] > RESIDUAL", "fit.residual[i] > 9", "strict::test_what_else_is_wrong_is_refused_for_its_reason"),
        ("a part may be missing", "fit.stray[i] > STRAY", "fit.stray[i] > 999", "strict::test_wrong_outlines_are_refused"),
        ("soft shapes are refused", "some in VARIANTS.items()", "some in ()", "strict::test_a_softly_rounded_bent_shape_is_accepted"),
        ("any size is accepted", "min(ratios) > self._tolerance", "min(ratios) > 9", "strict::test_a_disc_of_the_area_of_a_star_is_not_a_star"),
        ("faint shapes are accepted", "contrast < FAINTEST", "contrast < 0", "strict::test_what_else_is_wrong_is_refused_for_its_reason"),
        ("what is refused counts as right", 'row["all"] and not verdict.refused', 'row["all"]', "strict::test_wrong_outlines_are_refused"),
    ],
    "ldm/pipeline/habits.py": [
        ("height and width exchanged", 'sides.get("height", sample_size), sides.get("width", sample_size)', 'sides.get("width", sample_size), sides.get("height", sample_size)', "habits::test_a_height_that_is_the_models_own_may_stand_alone"),
        ("what a callback returns is lost", "return latents.to(x)", "return None", "habits::test_the_callback_after_each_step_is_theirs"),
        ("arrays in [−1, 1]", "(images * 0.5 + 0.5).clamp(0, 1)", "images.clamp(-1, 1)", "habits::test_types_of_output"),
    ],
    "ldm/pipeline/prompts.py": [
        ("the prompts are repeated as a whole", "[Prompt(text, {}) for text in check_prompts(prompts) for _ in range(copies)]", "[Prompt(text, {}) for text in check_prompts(prompts) * copies]", "habits::test_a_call_of_theirs_draws_what_it_draws_there"),
        ("a condition guided alone is not left out", "if k != name}", "if True}", "conditions::test_one_condition_is_guided_alone"),
    ],
    "ldm/pipeline/draw.py": [
        ("a model that fills is helped", "spec.fills and settings.completion is None", "spec.fills and False", "filling::test_stable_diffusions_inpainting_is_diffusers filling::test_known_pixels_are_kept_and_blending_can_be_added"),
        ("a warning points into the library", "settings, stacklevel=4)", "settings, stacklevel=3)", "habits::test_warnings_point_at_the_line_that_calls"),
    ],
    "ldm/pipeline/model.py": [
        ("nothing is masked without a mask", "torch.ones(1, 1, height, width)", "torch.zeros(1, 1, height, width)", "filling::test_without_a_mask_everything_is_drawn"),
        ("the text encoder is not cast", "self.text.model.to(dtype)", "self.text.model.to(self.device)", "habits::test_every_network_is_cast_and_pictures_stay_pictures"),
    ],
    "ldm/pipeline/guides.py": [
        ("the weak model is conditioned at scale 0", "prompts if settings.guidance_scale else [null] * len(prompts)", "prompts", "pipeline::test_autoguidance_starts_where_classifier_free_guidance_does"),
        ("the weak model has no negative prompt", "settings.negative_prompt or guide.null_caption", "guide.null_caption", "pipeline::test_autoguidance_starts_where_classifier_free_guidance_does"),
        ("a guide of other latents", "if autoencoder != own:", "if False:", "classifier::test_a_classifier_of_other_latents_or_schedule_is_refused"),
    ],
    "ldm/pipeline/codec.py": [
        ("a stroke falls between two cells", "max_pool2d(masks, factor)", "masks[..., ::factor, ::factor]", "editing::test_a_thin_stroke_is_not_lost filling::test_a_cell_is_filled_if_any_of_its_pixels_is"),
        ("what is to be drawn is shown", "known = images * (1 - masks)", "known = images", "filling::test_the_channels_are_the_mask_and_the_rest_of_the_image"),
        ("the mask comes last", "torch.cat([cells(masks, known), known], dim=1)", "torch.cat([known, cells(masks, known)], dim=1)", "filling::test_stable_diffusions_inpainting_is_diffusers"),
        ("latents are shifted after the scale", "(posterior.sample(noise) - self.shift) * self.scale", "posterior.sample(noise) * self.scale - self.shift", "pipeline::test_a_foreign_autoencoder_keeps_its_scale_and_shift"),
        ("decoding shifts before the scale", "latent.float() / self.scale + self.shift", "(latent.float() + self.shift) / self.scale", "pipeline::test_a_foreign_autoencoder_keeps_its_scale_and_shift"),
    ],
    "ldm/pipeline/checks.py": [
        ("pictures without pixels", "size < factor or size % factor", "size % factor", "pipeline::test_an_argument_out_of_range_is_named"),
    ],
    "ldm/interop/diffusers/unet.py": [
        ("labels become a projection", '"timestep" if config.sinusoidal_labels else kind', "kind", "sd_layouts::test_unet_settings_go_there_and_back"),
        ("all channels are the sample's", 'out_channels // 2 if layout.get("learned_variance") else out_channels', "out_channels", "objective::test_channels_of_a_folder"),
        ("another default context", '"cross_attention_dim", 1280)', '"cross_attention_dim", 768)', "sd_layouts::test_an_absent_setting_has_the_default_of_diffusers"),
    ],
    "ldm/interop/diffusers/lora_folder.py": [
        ("a LoRA draws on whatever base lies there", "if sha256 != self.sha256:", "if False:", "lora::test_a_base_that_changed_or_is_gone_is_one_line"),
    ],
    "ldm/interop/weights.py": [
        ("a tensor too many passes", "if name not in wanted:\n            raise", "if False:\n            raise", "pipeline::test_tensors_that_do_not_fit_are_named"),
    ],
    "ldm/interop/compvis/names.py": [
        ("the middle's blocks exchanged", "middle_block.{2 * int(part[2])}", "middle_block.{2 - 2 * int(part[2])}", "compvis::test_diffusers_converts_our_unet_back"),
        ("the decoder's levels in our order", "up.{levels - 1 - int(m[1])}", "up.{int(m[1])}", "compvis::test_diffusers_converts_our_vae_back"),
        ("queries, keys and values in another order", 'for p in "qkv")', 'for p in "kqv")', "compvis::test_openclip_gives_the_same_states"),
    ],
    "ldm/interop/compvis/schedule.py": [
        ("a table of another process passes", "max(1e-4, _ROUNDINGS", "max(1e-1, _ROUNDINGS", "compvis::test_a_changed_table_is_refused"),
        ("the bound's first weight stays infinite", "torch.cat([weights[1:2], weights[1:]])", "weights", "compvis::test_weights_of_the_bound_and_log_variances"),
    ],
    "ldm/files/tensors/safetensors.py": [
        ("tensors may overlap", "if begin != position:", "if begin > position:", "archive::test_a_damaged_safetensors_file"),
        ("bytes after the last tensor pass", "if position != (given", "if position > (given", "archive::test_a_damaged_safetensors_file"),
    ],
    "autoencoder/layout.py": [
        ("another default of the groups", '"norm_num_groups", 32)', '"norm_num_groups", 16)', "sd_layouts::test_an_absent_setting_has_the_default_of_diffusers"),
        ("a scale that is folded in already", '"scaling_factor": 1.0,', '"scaling_factor": 0.18215,', "autoencoder::test_layout_round_trip"),
        ("another default scale", '"scaling_factor", 0.18215)', '"scaling_factor", 1.0)', "sd_layouts::test_the_latent_scale_has_diffusers_defaults"),
    ],
}  # fmt: skip

PLANTED = {**DATA, **DIFFUSION, **TRAINING, **MODELS, **AROUND}
